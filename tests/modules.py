"""The small modules and data of the tests, for scripts that import them from here."""

from tests.support.modules import Blobs, blobs, tiny_net, train_loader, trained, val_loader

__all__ = ["Blobs", "blobs", "tiny_net", "train_loader", "trained", "val_loader"]
