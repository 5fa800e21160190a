"""Train and prune a network for scikit-learn's digits, write it as C, and compile and run the C on this computer."""

import argparse
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from quickstart import DigitsClassifier, loaders
from torch import Tensor

from lightning_roulette import Exported, RouletteWheelPruning, export

MAIN = """\
#include <stdio.h>
#include "digits.h"

int main(void)
{
    static int8_t image[DIGITS_INPUT_SIZE], scores[DIGITS_OUTPUT_SIZE];
    while (fread(image, sizeof image, 1, stdin) == 1) {
        int i, best = 0;
        digits(image, scores);
        for (i = 1; i < DIGITS_OUTPUT_SIZE; i++)
            if (scores[i] > scores[best])
                best = i;
        printf("%d\\n", best);
    }
    return 0;
}
"""


def written(model: LightningModule, folder: Path) -> Exported:
    """Write the network of a model as `digits.c` and `digits.h`."""
    train, val, _ = loaders()
    (example, _), *_ = train
    return export(model.net, folder / "digits.c", "c", example_input=example, calibration=train, validation=val)


def classes(exported: Exported, images: Tensor) -> Tensor:
    """Compile the C source with gcc, run it on images, and return the class of each."""
    source = exported.files[0]
    main = source.with_name("main.c")
    main.write_text(MAIN)
    program = source.with_name("digits")
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Werror", "-O2", source, main, "-o", program], check=True)
    scale, zero = (header_number(exported, f"DIGITS_INPUT_{word}") for word in ("SCALE", "ZERO_POINT"))
    integers = (images / scale + zero).round().clamp(-128, 127).to(torch.int8)
    done = subprocess.run([program], input=integers.numpy().tobytes(), capture_output=True, check=True)
    return torch.tensor([int(one) for one in done.stdout.split()])


def header_number(exported: Exported, name: str) -> float:
    """Return a number that the header defines."""
    line = next(line for line in exported.files[1].read_text().splitlines() if f"#define {name} " in line)
    return float(line.split()[-1].strip("()f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("firmware"))
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*does not have many workers.*")
    seed_everything(0, verbose=False)
    train, val, test = loaders()
    model = DigitsClassifier()
    pruning = RouletteWheelPruning(tolerance=0.01)
    Trainer(max_epochs=options.epochs, callbacks=[pruning], enable_progress_bar=False, logger=False).fit(
        model, train, val
    )
    exported = written(model, options.folder)
    print(exported)
    if shutil.which("gcc") is None:
        print("gcc is not installed: the C source was not compiled.")
        return
    ((images, digits),) = test
    found = classes(exported, images)
    torch_found = model.net(images).argmax(1)
    print(f"Accuracy on {len(digits)} test images: C {share(found == digits)}, PyTorch {share(torch_found == digits)}.")


def share(right: Tensor) -> str:
    return f"{float(right.float().mean()):.2%}"


if __name__ == "__main__":
    main()
