"""An evaluator whose answers are written to a journal, or read from it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.judge.evaluator import Evaluator, as_evaluator
from lightning_roulette.judge.journal import Journal, bytes_of, fingerprint
from lightning_roulette.judge.outcomes import Batches, Outcomes, Resamples, Singles
from lightning_roulette.large.gathered import together
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Scores

_Answer = tuple[Scores, Outcomes | None]


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
        network, found = self._digest(candidate), list[Outcomes | None]()

        def validate() -> dict[str, Any]:
            scores, outcomes = evaluate(candidate, folds)
            found.append(outcomes)
            numbers = [float(one) for one in (scores.rank, scores.score, scores.tiebreak)]
            return {"scores": numbers, "outcomes": _plain(outcomes)}

        question = {"asked": what, "network": network, "folds": list(folds)}
        noted = self._journal.answer(question, validate, _is_dense(candidate))
        known = found[0] if found else None
        score = _Score(self._journal, network, list(folds), known, lambda: evaluate(candidate, folds)[1])
        return Scores(*noted["scores"]), _outcomes(noted["outcomes"], score)

    def _digest(self, candidate: PrunedWeights) -> str:
        """Return digits that identify a pruned network; two networks share them with probability 2**-128."""
        if candidate.refitted and candidate.refitted is not self._refitted[0]:
            values = candidate.refitted
            self._refitted = (values, together(fingerprint(values), values))
        return candidate.mask.digest.hex() + (self._refitted[1] if candidate.refitted else "")


@dataclass
class _Score:
    """The score of resamples, through the journal. The network is validated if the journal does not hold the score.

    Attributes:
        journal: Journal of the search.
        network: Digest of the network.
        folds: Folds of the outcomes.
        found: Outcomes of the network, if it was validated.
        validate: Validates the network and returns its outcomes.
    """

    journal: Journal
    network: str
    folds: Sequence[int]
    found: Outcomes | None
    validate: Callable[[], Outcomes | None]

    def __call__(self, index: Tensor) -> float:
        samples = blake2b(bytes_of(index), digest_size=8).hexdigest()
        question = {"asked": "resample", "network": self.network, "folds": self.folds, "samples": samples}
        return float(self.journal.answer(question, lambda: self._scored(index), False))

    def _scored(self, index: Tensor) -> float:
        self.found = self.validate() if self.found is None else self.found
        assert isinstance(self.found, Resamples)
        return float(self.found.score(index))


def _is_dense(candidate: PrunedWeights) -> bool:
    return not candidate.refitted and candidate.mask.survivors == candidate.mask.size


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
    return {"dtype": str(values.dtype).removeprefix("torch."), "bytes": base64.b64encode(bytes_of(values)).decode()}


def _read(written: Mapping[str, str]) -> Tensor:
    values, dtype = bytearray(base64.b64decode(written["bytes"])), getattr(torch, written["dtype"])
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
