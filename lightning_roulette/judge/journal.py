"""The journal of a search: a file with the evaluator's answers, so that a killed search repeats no validation.

A question names what is judged: the network, by a digest of its mask and its refitted values, the folds, and the kind
of answer. An answer is found by its question, whatever the order. Random draws are counter-based, and a refit depends
on its arguments only. A search that is started again therefore asks about the same networks. They are drawn and
refitted again, but not validated again. Refitted values, and masks that a refit chose, may differ on another machine or
with another number of threads. Then there is no answer for them, and they are validated.

The first question and all questions about the dense network are validated in any case. If the numbers differ in any bit
from the journal, the data or the network have changed, and the journal is not used.

Each line of the file is a JSON object. The first line identifies the search, and each other line holds a question and
its answer. A line that is cut off is ignored, with all lines after it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.large.shards import local


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
    """Questions and answers.

    Args:
        path: Path of the file; None: nothing is written.
        search: Fingerprint of the search.
        lines: Lines that `lines_in` returned for the file.
        agreed: Returns whether a condition is true in all processes. They must take the same steps, so all of them use
            an answer or none does.
    """

    def __init__(
        self,
        path: str | None,
        search: str,
        lines: Sequence[str] = (),
        agreed: Callable[[bool], bool] = lambda here: here,
    ) -> None:
        self._path, self._head, self._agreed = path, f"{_head(search)}\n".encode(), agreed
        self._size = len(self._head) + sum(len(line.encode()) + 1 for line in lines) if lines else 0
        self._answers = _by_question(lines)
        self._left = len(lines)  # equal in all processes, even if their questions differ
        self._asked = self._writing = False
        self._verified = b""  # lines of answers that were evaluated in any case

    def answer(self, question: Mapping[str, Any], evaluate: Callable[[], Any], verify: bool) -> Any:
        """Return the noted answer to a question, or a new one, which is then noted.

        A search may ask the same question several times. Each noted answer is used once.

        Args:
            question: Plain values.
            evaluate: Returns a new answer, in plain values.
            verify: Whether to evaluate in any case. The first question is always evaluated. If the noted answer
                differs, or if there is none for the first question, all noted answers are dropped.
        """
        noted, first, self._asked = self._recall(question), not self._asked, True
        if noted is not None and not (verify or first):
            return noted
        answer = evaluate()
        if noted is None or not self._agreed(_text(noted) == _text(answer)):
            if noted is not None or first:
                self._drop()
            self.note(question, answer)
        if verify or first:
            self._verified += _line(question, answer)
        return answer

    def _recall(self, question: Mapping[str, Any]) -> Any:
        """Return a noted answer that was not used yet; None if a process has none."""
        if not self._left or not self._agreed(bool(self._answers.get(key := _text(question)))):
            return None
        self._left -= 1
        return self._answers[key].popleft()

    def _drop(self) -> None:
        """Forget all noted answers but those that were verified. The next new answer replaces the file."""
        self._answers.clear()
        self._left = self._size = 0
        self._writing = False

    def note(self, question: Mapping[str, Any], answer: Any) -> None:
        """Write a new answer to the end of the file."""
        if self._path is None:
            return
        try:
            self._write(self._path, _line(question, answer))
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
        """Keep the lines that were read, and drop the rest of the file."""
        if self._size:
            os.truncate(path, self._size)
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(self._head + self._verified)

    def remove(self) -> None:
        """Delete the file. Call this when the search has ended."""
        if self._path is not None:
            with suppress(OSError):
                os.remove(self._path)


def _text(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True)


def _line(question: Mapping[str, Any], answer: Any) -> bytes:
    return f"{_text({'question': question, 'answer': answer})}\n".encode()


def _by_question(lines: Sequence[str]) -> dict[str, deque[Any]]:
    """Return the answers to each question, in the order noted."""
    found = defaultdict[str, deque[Any]](deque)
    for line in lines:
        noted = json.loads(line)
        found[_text(noted["question"])].append(noted["answer"])
    return found


def _take_in(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.layout != torch.strided:
            sparse = tensor.detach().to_sparse_coo().coalesce()
            digest.update(bytes_of(sparse.indices()))
            tensor = sparse.values()
        digest.update(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, or of the part of it that this process holds."""
    return local(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
