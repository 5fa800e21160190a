"""`nn.MultiheadAttention` with fewer heads than its width is divided into."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(nn.MultiheadAttention):
    """An attention whose heads together are narrower than its inputs, with parameters of the same names.

    The rows of the projections of queries, keys and values, and the columns of the output projection, are those of the
    heads that are left. It is made of an attention of torch by `narrowed`, and computes what that one computes if what
    reads the other heads is zero. The attention weights that it returns are those of the heads that are left.

    Attributes:
        heads_left: The numbers of its heads in the first attention. Masks for each head are given for all of those.
    """

    heads_left: list[int]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is True, but attn_mask is None. Pass the causal mask, too.")
        batched = query.dim() == 3
        swapped = self.batch_first or not batched
        rows = [(one if batched else one.unsqueeze(0)) for one in (query, key, value)]
        rows = rows if swapped else [one.transpose(0, 1) for one in rows]
        queries, keys, values = self._with_biases(*map(self._in_heads, self._projected(rows)))
        mask = self._mask(attn_mask, key_padding_mask, keys.shape[2], queries)
        shown, dropped = None, self.dropout if self.training else 0.0
        if need_weights:
            weights = queries @ keys.mT / math.sqrt(self.head_dim)
            weights = F.dropout(torch.softmax(weights if mask is None else weights + mask, -1), dropped)
            heads, shown = weights @ values, weights.mean(1) if average_attn_weights else weights
        else:  # as torch does: a query that may look at no key gets zeros, and not NaN
            heads = F.scaled_dot_product_attention(queries, keys, values, mask, dropped)
        joined = heads.transpose(1, 2).flatten(2)
        found = F.linear(joined, self.out_proj.weight, self.out_proj.bias)  # as torch does, which calls no module
        found = found if swapped else found.transpose(0, 1)
        if not batched:
            found, shown = found.squeeze(0), None if shown is None else shown.squeeze(0)
        return found, shown

    def _projected(self, rows: list[Tensor]) -> list[Tensor]:
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(one, w, b) for one, w, b in zip(rows, weights, biases, strict=True)]

    def _in_heads(self, rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _with_biases(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the learned key and value, and those of zeros, at the end."""
        if self.bias_k is not None and self.bias_v is not None:
            more = [self._in_heads(one).expand(len(keys), -1, -1, -1) for one in (self.bias_k, self.bias_v)]
            keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
        if self.add_zero_attn:
            keys, values = (F.pad(one, (0, 0, 0, 1)) for one in (keys, values))
        return queries, keys, values

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, keys: int, like: Tensor) -> Tensor | None:
        """Return what is added to the products, of a shape that broadcasts to `(batch, heads, queries, keys)`."""
        masks = []
        if attn_mask is not None:
            whole = attn_mask if attn_mask.dim() == 2 else self._of_heads(attn_mask, len(like))
            masks.append(_added(whole, like))
        if padding is not None:
            masks.append(_added(padding if padding.dim() == 2 else padding[None], like)[:, None, None])
        summed = [F.pad(one, (0, keys - one.shape[-1])) for one in masks]
        return None if not summed else summed[0] if len(summed) == 1 else summed[0] + summed[1]

    def _of_heads(self, mask: Tensor, batch: int) -> Tensor:
        """Return a mask for each head, `(batch * heads of the first attention, ...)`, for the heads that are left."""
        heads: Tensor = mask.unflatten(0, (batch, -1))
        return heads[:, self.heads_left]


def narrowed(part: nn.MultiheadAttention, stays: Tensor) -> dict[str, Any]:
    """The attributes that make an attention a narrow one.

    Args:
        part: The attention, of which heads have been cut out.
        stays: Whether each of its heads is left, shape `(heads,)`, bool.
    """
    before = part.heads_left if isinstance(part, NarrowAttention) else list(range(part.num_heads))
    left = [head for head, is_left in zip(before, stays.tolist(), strict=True) if is_left]
    # the fused code of torch's encoder needs heads as wide as the inputs; it stays away if the widths differ
    return {"__class__": NarrowAttention, "heads_left": left, "num_heads": len(left), "_qkv_same_embed_dim": False}


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add. True means that a key is not looked at."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
