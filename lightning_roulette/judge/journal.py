"""The journal of a search: what its evaluator answered, noted in a file, so that a killed search repeats no validation.

Chance is counter-based and a refit a function of what it is given: on the same answers a search takes the same way. A
search that is begun again is given the noted answers as long as it asks the same questions; networks are spun and
refitted again, not validated. What is asked about first, and the dense network, is validated in any case: if that gives
other numbers, bit for bit, than were noted, the data or the network are not what they were, and nothing of the journal
is used.

The file has one JSON object a line: first the search that it belongs to, then a question and its answer each. A line
that was cut off, and all after it, counts for nothing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.judge.certificate import Batches, Outcomes, Resamples, Singles
from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.large.shards import local
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Scores

_Answer = tuple[Scores, Outcomes | None]


def fingerprint(tensors: Mapping[str, Tensor], *facts: object) -> str:
    """What tells one search from another: 32 hexadecimal digits of the network's values and of some facts.

    Args:
        tensors: All that a validation sees of the dense network, by name.
        facts: Settings and numbers, each by its `repr`, in which addresses in memory do not count.
    """
    digest = blake2b(digest_size=16)
    _take_in(digest, tensors)
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(facts)).encode())
    return digest.hexdigest()


def lines_in(path: str, search: str) -> list[str]:
    """The whole lines of a journal, less the first; none if there is no such file, or it is of another search.

    Args:
        path: Of the file.
        search: The fingerprint.
    """
    with suppress(OSError, ValueError), open(path, "rb") as file:
        head, *lines = file.read().split(b"\n")[:-1]  # what follows the last line break was cut off
        if head.decode() == _head(search):
            return [line.decode() for line in lines[: _sound(lines)]]
    return []


def _head(search: str) -> str:
    return json.dumps({"search": search})


def _sound(lines: Sequence[bytes]) -> int:
    """How many lines there are before the first that is none."""
    for number, line in enumerate(lines):
        try:
            found = json.loads(line)
        except ValueError:
            return number
        if not isinstance(found, dict) or found.keys() != {"question", "answer"}:
            return number
    return len(lines)


class Journal:
    """Questions and their answers, in the order in which they were asked.

    Args:
        path: Of the file; None: nothing is written.
        search: The fingerprint of the search that it belongs to.
        lines: What `lines_in` found there.
        agreed: Whether what is true here is true in all processes, which must go the same way.
    """

    def __init__(
        self,
        path: str | None,
        search: str,
        lines: Sequence[str] = (),
        agreed: Callable[[bool], bool] = lambda here: here,
    ) -> None:
        self._path, self._head, self._agreed = path, f"{_head(search)}\n".encode(), agreed
        self._waiting = deque(lines)
        self._size = len(self._head) if lines else 0
        self._writing = False

    def recall(self, question: Mapping[str, Any]) -> Any:
        """The answer to a question, if it is the next that was noted; None if it is not, or there is no more."""
        if not self._waiting:
            return None
        noted = json.loads(self._waiting[0])
        if self._agreed(noted["question"] == question):
            return noted["answer"]
        self._waiting.clear()
        return None

    def note(self, question: Mapping[str, Any], answer: Any) -> None:
        """Go on to the next question: past one that was noted just so, else write it in place of all that follows."""
        line = json.dumps({"question": question, "answer": answer}, sort_keys=True)
        if self._waiting and self._agreed(self._waiting[0] == line):
            self._waiting.popleft()
            self._size += len(line) + 1
            return
        self._waiting.clear()
        if self._path is None:
            return
        try:
            self._write(self._path, f"{line}\n".encode())
        except OSError as error:
            self._path = None
            warnings.warn(
                f"the progress of the search cannot be noted ({error}). It goes on; if it is killed, it begins anew.",
                stacklevel=2,
            )

    def _write(self, path: str, line: bytes) -> None:
        if not self._writing:
            self._begin(path)
            self._writing = True
        with open(path, "ab") as file:
            file.write(line)

    def _begin(self, path: str) -> None:
        """Keep of the file what was gone past."""
        if self._size:
            os.truncate(path, self._size)
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(self._head)

    def remove(self) -> None:
        """Take the file away: the search has ended."""
        if self._path is not None:
            with suppress(OSError):
                os.remove(self._path)


class Noted:
    """An evaluator whose answers go into a journal, or come from it.

    Args:
        evaluate: The evaluator. All that it has, this has.
        journal: Of a search with it.
    """

    def __init__(self, evaluate: Evaluator, journal: Journal) -> None:
        self._evaluate, self._journal = evaluate, journal
        self._asked = False
        self._refitted: tuple[Mapping[str, Tensor], str] = ({}, "")  # what was hashed last: a branch shares it

    @property
    def folds(self) -> int:
        """See `Evaluator`."""
        return self._evaluate.folds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._evaluate, name)
        return partial(self._answer, found, "recorded") if name == "recorded" else found

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        return self._answer(lambda *asked: (self._evaluate(*asked), None), "scores", candidate, folds)[0]

    def _answer(
        self,
        evaluate: Callable[[PrunedWeights, Sequence[int]], _Answer],
        what: str,
        candidate: PrunedWeights,
        folds: Sequence[int],
    ) -> _Answer:
        network = self._digest(candidate)
        question = {"asked": what, "network": network, "folds": list(folds)}
        found: Outcomes | None = None
        first, self._asked = not self._asked, True
        if (noted := self._journal.recall(question)) is None or first or _is_dense(candidate):
            scores, found = evaluate(candidate, folds)
            noted = {"scores": [float(one) for one in (scores.rank, scores.score, scores.tiebreak)]}
            noted["outcomes"] = _plain(found)
        self._journal.note(question, noted)
        score = _Score(self._journal, network, found, lambda: evaluate(candidate, folds)[1])
        return Scores(*noted["scores"]), _outcomes(noted["outcomes"], score)

    def _digest(self, candidate: PrunedWeights) -> str:
        """Equal for equal networks over the same dense one; for different ones with a chance of 2**-128."""
        if candidate.refitted and candidate.refitted is not self._refitted[0]:
            self._refitted = (candidate.refitted, fingerprint(candidate.refitted))
        return candidate.mask.digest.hex() + (self._refitted[1] if candidate.refitted else "")


@dataclass
class _Score:
    """The score of resamples, noted as well; where none was, the network is validated for it.

    Attributes:
        journal: Of the search.
        network: The digest of the network.
        found: Its outcomes, if it was validated.
        validate: Gives them.
    """

    journal: Journal
    network: str
    found: Outcomes | None
    validate: Callable[[], Outcomes | None]

    def __call__(self, index: Tensor) -> float:
        samples = blake2b(_bytes(index), digest_size=8).hexdigest()
        question = {"asked": "resample", "network": self.network, "samples": samples}
        if (score := self.journal.recall(question)) is None:
            self.found = self.validate() if self.found is None else self.found
            assert isinstance(self.found, Resamples)
            score = float(self.found.score(index))
        self.journal.note(question, score)
        return float(score)


def _is_dense(candidate: PrunedWeights) -> bool:
    return not candidate.refitted and candidate.mask.survivors == candidate.mask.size


def _take_in(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.layout != torch.strided:
            sparse = tensor.detach().to_sparse_coo().coalesce()
            digest.update(_bytes(sparse.indices()))
            tensor = sparse.values()
        digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return local(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _plain(outcomes: Outcomes | None) -> dict[str, Any] | None:
    """Outcomes for JSON."""
    match outcomes:
        case None:
            return None
        case Singles(values, low, high):
            return {"kind": "singles", "values": _written(values), "low": float(low), "high": float(high)}
        case Resamples():
            return {"kind": "resamples", "size": outcomes.size}
        case Batches(values, weights):
            return {"kind": "batches", "values": _written(values), "weights": _written(weights)}


def _outcomes(plain: Mapping[str, Any] | None, score: Callable[[Tensor], float]) -> Outcomes | None:
    """The outcomes that `_plain` was given; of resamples the score is asked for."""
    match plain and plain["kind"]:
        case "singles":
            return Singles(_read(plain["values"]), plain["low"], plain["high"])  # type: ignore[index]
        case "resamples":
            return Resamples(score, plain["size"])  # type: ignore[index]
        case "batches":
            return Batches(_read(plain["values"]), _read(plain["weights"]))  # type: ignore[index]
    return None


def _written(values: Tensor) -> dict[str, str]:
    return {"dtype": str(values.dtype).removeprefix("torch."), "bytes": base64.b64encode(_bytes(values)).decode()}


def _read(written: Mapping[str, str]) -> Tensor:
    values, dtype = bytearray(base64.b64decode(written["bytes"])), getattr(torch, written["dtype"])
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
