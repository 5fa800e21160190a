"""The journal of a search: a file with the evaluator's answers, so that a killed search repeats no validation.

Random draws are counter-based, and a refit depends on its arguments only. With the same answers a search therefore
takes the same steps. A search that is started again gets the answers from the journal as long as it asks the same
questions. Networks are drawn and refitted again, but not validated again.

The first question and all questions about the dense network are validated in any case. If the numbers differ in any bit
from the journal, the data or the network have changed, and the journal is not used.

Each line of the file is a JSON object. The first line identifies the search, and each other line holds a question and
its answer. A line that is cut off is ignored, with all lines after it.
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
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.judge.evaluator import Evaluator, as_evaluator
from lightning_roulette.judge.outcomes import Batches, Outcomes, Resamples, Singles
from lightning_roulette.large.shards import local
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Scores

_Answer = tuple[Scores, Outcomes | None]


def fingerprint(tensors: Mapping[str, Tensor], *facts: object) -> str:
    """Return 32 hexadecimal digits that identify a search by the values of its network and by its settings.

    Args:
        tensors: All tensors of the dense network that a validation uses, by name.
        facts: Settings and numbers. Their `repr` is used, without addresses in memory.
    """
    digest = blake2b(digest_size=16)
    _take_in(digest, tensors)
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(facts)).encode())
    return digest.hexdigest()


def lines_in(path: str, search: str) -> list[str]:
    """Return the complete lines of a journal after its first line; none for a missing file or another search.

    Args:
        path: Path of the file.
        search: Fingerprint of the search.
    """
    with suppress(OSError, ValueError), open(path, "rb") as file:
        head, *lines = file.read().split(b"\n")[:-1]  # text after the last line break was cut off
        if head.decode() == _head(search):
            return [line.decode() for line in lines[: _sound(lines)]]
    return []


def _head(search: str) -> str:
    return json.dumps({"search": search})


def _sound(lines: Sequence[bytes]) -> int:
    """Return the number of lines before the first damaged line."""
    for number, line in enumerate(lines):
        try:
            found = json.loads(line)
        except ValueError:
            return number
        if not isinstance(found, dict) or found.keys() != {"question", "answer"}:
            return number
    return len(lines)


class Journal:
    """Questions and answers, in the order asked.

    Args:
        path: Path of the file; None: nothing is written.
        search: Fingerprint of the search.
        lines: Lines that `lines_in` returned for the file.
        agreed: Returns whether a condition is true in all processes. They must take the same steps.
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
        """Return the noted answer if this question is the next in the journal; else None."""
        if not self._waiting:
            return None
        noted = json.loads(self._waiting[0])
        if self._agreed(noted["question"] == question):
            return noted["answer"]
        self._waiting.clear()
        return None

    def note(self, question: Mapping[str, Any], answer: Any) -> None:
        """Step to the next question. If the journal holds another line here, the new line replaces all that follow."""
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
                f"the progress of the search cannot be saved ({error}). If it is killed, it cannot be resumed.",
                stacklevel=2,
            )

    def _write(self, path: str, line: bytes) -> None:
        if not self._writing:
            self._begin(path)
            self._writing = True
        with open(path, "ab") as file:
            file.write(line)

    def _begin(self, path: str) -> None:
        """Keep the part of the file that was used, and drop the rest."""
        if self._size:
            os.truncate(path, self._size)
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(self._head)

    def remove(self) -> None:
        """Delete the file. Call this when the search has ended."""
        if self._path is not None:
            with suppress(OSError):
                os.remove(self._path)


class Noted(Evaluator):
    """An evaluator whose answers are written to a journal, or read from it.

    Args:
        evaluate: The evaluator, or anything else that `as_evaluator` accepts.
        journal: Journal of a search with this evaluator.
    """

    def __init__(self, evaluate: Evaluator | Callable[[Mask], float], journal: Journal) -> None:
        self._evaluate, self._journal = as_evaluator(evaluate), journal
        self.folds, self.undivided_because = self._evaluate.folds, self._evaluate.undivided_because
        self.at_once, self.at_least = self._evaluate.at_once, self._evaluate.at_least
        self.gain = self._evaluate.gain
        self._asked = False
        self._refitted: tuple[Mapping[str, Tensor], str] = ({}, "")  # the last values hashed: a branch shares them

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        return self._answer(lambda *asked: (self._evaluate(*asked), None), "scores", candidate, folds)[0]

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> _Answer:
        """See `Evaluator`."""
        return self._answer(self._evaluate.recorded, "recorded", candidate, folds)

    def in_any_process(self, here: bool) -> bool:
        """See `Evaluator`."""
        return self._evaluate.in_any_process(here)

    @property
    def records(self) -> bool:
        """Whether the evaluator itself returns outcomes."""
        return self._evaluate.records

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
        """Return digits that identify a pruned network; two networks share them with probability 2**-128."""
        if candidate.refitted and candidate.refitted is not self._refitted[0]:
            self._refitted = (candidate.refitted, fingerprint(candidate.refitted))
        return candidate.mask.digest.hex() + (self._refitted[1] if candidate.refitted else "")


@dataclass
class _Score:
    """The score of resamples, through the journal. The network is validated if the journal does not hold the score.

    Attributes:
        journal: Journal of the search.
        network: Digest of the network.
        found: Outcomes of the network, if it was validated.
        validate: Validates the network and returns its outcomes.
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
    """Return outcomes as plain values for JSON."""
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
    """Return the outcomes that `_plain` wrote. Those of resamples use the given score."""
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
