"""Contract tests: each rule is found broken in an implementation that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from raymask.core.errors import UserError
from raymask.core.masking.allocations import Shapes, uniform
from raymask.core.masking.patterns import Pattern
from raymask.core.masking.samplers import SampleFn
from raymask.core.masking.scorers import Calibration
from raymask.runs import local_storage
from raymask.runs.local_storage import LocalStorage
from raymask.testing import check_allocation, check_pattern, check_sampler, check_score, check_storage
from raymask.testing.storage import BlockError

# --- samplers --------------------------------------------------------------------------------------------------------


def noisy(scores: Tensor, rng: torch.Generator) -> Tensor:
    """A sampler's valid answer."""
    return scores * (0.5 + torch.rand(scores.shape, generator=rng))


def sampler_of(sample: SampleFn) -> Callable[..., SampleFn]:
    return lambda scores, k, exponent, num_votes: sample


def in_place(scores: Tensor, rng: torch.Generator) -> Tensor:
    return scores.mul_(0.5)


def of_another_dtype(scores: Tensor, rng: torch.Generator) -> Tensor:
    return noisy(scores, rng).double()


def of_another_shape(scores: Tensor, rng: torch.Generator) -> Tensor:
    return noisy(scores, rng).view(-1)


def below_zero(scores: Tensor, rng: torch.Generator) -> Tensor:
    return -noisy(scores, rng)


def not_a_number(scores: Tensor, rng: torch.Generator) -> Tensor:
    return noisy(scores, rng) / 0 * 0


def above_zero(scores: Tensor, rng: torch.Generator) -> Tensor:
    return noisy(scores, rng) + 1e-6


def too_few(scores: Tensor, rng: torch.Generator) -> Tensor:
    sampled = noisy(scores, rng)
    return torch.where(sampled < sampled.amax(1, keepdim=True), 0.0, sampled)


def of_the_global_generator(scores: Tensor, rng: torch.Generator) -> Tensor:
    return scores * (0.5 + torch.rand(scores.shape))


def the_same_for_all(scores: Tensor, rng: torch.Generator) -> Tensor:
    return scores.clone()


@pytest.mark.parametrize(
    ("sample", "rule"),
    [
        (in_place, "A sampler must leave the scores as they are"),
        (of_another_dtype, "must be float32 of shape [1, 12], not torch.float64 of [1, 12]"),
        (of_another_shape, "must be float32 of shape [1, 12], not torch.float32 of [12]"),
        (below_zero, "Perturbed scores must be 0 or more, and none of them NaN"),
        (not_a_number, "Perturbed scores must be 0 or more, and none of them NaN"),
        (above_zero, "A score of 0 must stay 0, or what is pruned comes back"),
        (too_few, "At least k of the scores above 0 must stay above 0, or a mask keeps too few"),
        (of_the_global_generator, "All randomness must come from the generator, and no state be kept"),
        (the_same_for_all, "Another generator must give other scores, or all candidates are one mask"),
    ],
)
def test_a_sampler_that_breaks_a_rule_is_told_which(sample: SampleFn, rule: str) -> None:
    assert rule in broken(check_sampler, sampler_of(sample))


def test_a_sampler_s_rules_can_be_kept_and_a_broken_one_be_seen() -> None:
    check_sampler(sampler_of(noisy))
    message = broken(check_sampler, sampler_of(above_zero))
    call, scores = message.partition("To see it: ")[2].split(" with scores = ")
    names = {"torch": torch, "sampler": sampler_of(above_zero), "scores": eval(scores)}  # noqa: S307 - our own
    assert eval(call, names)[names["scores"] == 0].all()  # noqa: S307


def broken(check: Callable[..., None], *arguments: Any) -> str:
    """The message of a check that fails."""
    with pytest.raises(AssertionError) as raised:
        check(*arguments)
    return str(raised.value)


# --- scores ----------------------------------------------------------------------------------------------------------


def doubled(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.mul_(2).float().abs()


def own_dtype(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.abs()


def by_row(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.float().abs().sum(1)


def infinite(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.float().abs() / 0


def of_all(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.float().abs() + 1


def without_floor(weight: Tensor, calibration: Calibration | None) -> Tensor:
    assert calibration is not None
    return weight.float().abs() * calibration.inputs


def drawn(weight: Tensor, calibration: Calibration | None) -> Tensor:
    return weight.float().abs() * (1 + torch.rand(weight.shape))


@pytest.mark.parametrize(
    ("score", "rule"),
    [
        (doubled, "A score must leave the weight as it is"),
        (own_dtype, "Scores must be float32 of shape [4, 6], not torch.bfloat16 of [4, 6]"),
        (by_row, "Scores must be float32 of shape [4, 6], not torch.float32 of [4]"),
        (infinite, "Scores must be finite where weights and calibration are"),
        (of_all, "A weight of 0 must score 0, or what is pruned comes back"),
        (without_floor, "A weight other than 0 must score above 0, or a mask keeps too few"),
        (drawn, "The same weight must score the same again"),
    ],
)
def test_a_score_that_breaks_a_rule_is_told_which(score: Callable[..., Tensor], rule: str) -> None:
    message = broken(check_score, score)
    assert message.startswith(rule)
    assert "To see it: score(torch.tensor([[" in message


# --- allocations -----------------------------------------------------------------------------------------------------

Shares = dict[tuple[str, ...], float]


def forgetful(shapes: Shapes, density: float) -> Shares:
    return dict(list(uniform(shapes, density).items())[1:])


def twice(shapes: Shapes, density: float) -> Shares:
    return uniform(shapes, density) | {tuple(shapes): density}


def over(shapes: Shapes, density: float) -> Shares:
    return dict.fromkeys(uniform(shapes, density), 1.5 * density)


def half(shapes: Shapes, density: float) -> Shares:
    return dict.fromkeys(uniform(shapes, density), density / 2)


def regrouped(shapes: Shapes, density: float) -> Shares:
    return uniform(shapes, density) if density > 0.3 else {tuple(shapes): density}


def growing(shapes: Shapes, density: float) -> Shares:
    """A lower density gives the first of equal matrices more."""
    if len(shapes) != 3 or density not in (0.25, 0.1):
        return uniform(shapes, density)
    first, *rest = shapes
    shares = {(first,): 0.3 if density == 0.1 else 0.25}
    size = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    left = density * sum(size.values()) - shares[first,] * size[first]
    return shares | {(name,): left / sum(size[other] for other in rest) for name in rest}


@pytest.mark.parametrize(
    ("allocation", "rule"),
    [
        (forgetful, "Every matrix must be named once, not "),
        (twice, "Every matrix must be named once, not down, down, query, query, up, up"),
        (over, "Every density must lie in (0, 1]"),
        (half, "Together they must keep 64 weights, not 32"),
        (regrouped, "The same matrices must share a budget at every density"),
        (growing, "A lower density must give no matrix more, or levels do not nest"),
    ],
)
def test_an_allocation_that_breaks_a_rule_is_told_which(allocation: Callable[..., Shares], rule: str) -> None:
    message = broken(check_allocation, allocation)
    assert message.startswith(rule)
    assert "To see it: allocation({'" in message


# --- patterns --------------------------------------------------------------------------------------------------------


class Means(Pattern):
    """A block's score is the mean of its weights' scores."""

    def to_groups(self, scores: Tensor) -> Tensor:
        return super().to_groups(scores) / (self.block[0] * self.block[1])


class Numbers(Pattern):
    """Masks are numbers."""

    def from_groups(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        return super().from_groups(kept, shape).float()


class Transposed(Pattern):
    """Elements are not where they came from, though each is somewhere."""

    def from_groups(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        return super().from_groups(kept, shape).flip(0)


class Overlapping(Pattern):
    """The last column of weights lies in no element."""

    def to_groups(self, scores: Tensor) -> Tensor:
        return super().to_groups(scores[:, :-1])

    def from_groups(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        mask = super().from_groups(kept, (shape[0], shape[1] - 1))
        return torch.nn.functional.pad(mask, (0, 1))


class Reviving(Pattern):
    """What scores 0 is kept first."""

    def to_groups(self, scores: Tensor) -> Tensor:
        return super().to_groups(torch.where(scores == 0, 2.0, scores))


class Generous(Pattern):
    """It says that it keeps one more than it does."""

    def num_kept(self, entries: int, density: float) -> int:
        return super().num_kept(entries, density) + 1


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (Pattern(block=(5, 1)), "The shape must be one that the pattern divides"),
        (Numbers(), "A mask must be bool of shape (24, 48), not torch.float32 of (24, 48)"),
        (Means(block=(2, 2)), "An element's score must be the sum of its weights' scores"),
        (Transposed(), "An element's score must be the sum of its weights' scores"),
        (Overlapping(), "Every weight must lie in one element"),
        (Generous(), "A mask must keep 1153 weights, not 1152"),
        (Reviving(), "A mask must keep no weight that its parent prunes"),
    ],
)
def test_a_pattern_that_breaks_a_rule_is_told_which(pattern: Pattern, rule: str) -> None:
    message = broken(check_pattern, pattern)
    assert message.startswith(rule)
    assert "To see it: pattern." in message


# --- storage ---------------------------------------------------------------------------------------------------------


class CreatesWhatItReads(LocalStorage):
    def read(self, name: str) -> bytes:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).with_suffix(".log").touch()
        return super().read(name)


class ReadsEmpty(LocalStorage):
    def read(self, name: str) -> bytes:
        return super().read(name) if self.has(name) else b""


class ReadingGivesEmpty(LocalStorage):
    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with super().reading(name) as path:
            if not path.exists():
                path = self.path.with_name("empty")
                path.touch()
            yield path


class HasFolders(LocalStorage):
    def has(self, name: str) -> bool:
        return (self.path / name).exists()


class HasAll(LocalStorage):
    def has(self, name: str) -> bool:
        return True


class AlwaysLocked(LocalStorage):
    def is_locked(self) -> bool:
        return True


class NamesTheRoot(LocalStorage):
    def names(self, under: str = "") -> Iterator[str]:
        yield from super().names(under)
        yield "."


class NamesTwice(LocalStorage):
    def names(self, under: str = "") -> Iterator[str]:
        yield from super().names(under)
        yield from super().names(under)


class ReadsTheFirst(LocalStorage):
    """What `read` gave once, or `reading`, it gives again."""

    first: ClassVar[dict[str, bytes]] = {}

    def read(self, name: str) -> bytes:
        return self.first.setdefault(name, super().read(name))


class ReadingGivesTheFirst(ReadsTheFirst):
    def read(self, name: str) -> bytes:
        return LocalStorage.read(self, name)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with super().reading(name) as path:
            if path.exists():
                path.with_suffix(".part").write_bytes(self.first.setdefault(name, path.read_bytes()))
                path = path.with_suffix(".part")
            yield path


class NamesAll(LocalStorage):
    def names(self, under: str = "") -> Iterator[str]:
        return super().names()


class NamesLocks(LocalStorage):
    def names(self, under: str = "") -> Iterator[str]:
        yield from super().names(under)
        yield from (path.name for path in self.path.glob("lock"))


class WritesAtOnce(LocalStorage):
    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        yield self.path / name


class WritesNothing(LocalStorage):
    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with super().writing(f"{name}.other") as path:
            yield path


class WritesWhatRaised(LocalStorage):
    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        errors = []
        with super().writing(name) as path:
            try:
                yield path
            except BlockError as error:
                errors.append(error)
        for error in errors:
            raise error


class WritesFoldersThatRaised(LocalStorage):
    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        errors = []
        with super().writing_folder(name) as folder:
            try:
                yield folder
            except BlockError as error:
                errors.append(error)
        for error in errors:
            raise error


class KeepsOldFiles(LocalStorage):
    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        with super().writing_folder(name) as folder:
            for path in (self.path / name).glob("*"):
                if path.is_file():
                    (folder / path.name).write_bytes(path.read_bytes())
            yield folder


class WritesFoldersAtOnce(LocalStorage):
    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        (self.path / name).mkdir(parents=True)
        yield self.path / name


class ReadsFlatFolders(LocalStorage):
    @contextmanager
    def reading_folder(self, name: str) -> Iterator[Path]:
        yield self.path / name / "inner"


class CutsLargeFiles(LocalStorage):
    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with super().reading(name) as path:
            if self.has(name):
                path.write_bytes(path.read_bytes()[: 2**20])
            yield path


class AppendsBytes(LocalStorage):
    def append(self, name: str, line: bytes) -> None:
        before = self.read(name) if self.has(name) else b""
        with self.writing(name) as path:
            path.write_bytes(before + line)


class AppendsToTornLines(LocalStorage):
    def append(self, name: str, line: bytes) -> None:
        before = self.read(name) if self.has(name) else b""
        with self.writing(name) as path:
            path.write_bytes(before + line + b"\n")


class LocksNothing(LocalStorage):
    @contextmanager
    def lock(self) -> Iterator[None]:
        yield


class LocksTwice(LocalStorage):
    @contextmanager
    def lock(self) -> Iterator[None]:
        try:
            with super().lock():
                yield
        except UserError:
            yield


class StaysLocked(LocalStorage):
    def is_locked(self) -> bool:
        return (self.path / "lock").exists()


class Nameless(LocalStorage):
    def at(self, name: str = "") -> str:
        return self.uri


@pytest.mark.parametrize(
    ("storage", "rule"),
    [
        (HasAll, 'has("a/b") must be False where no such file is'),
        (ReadsEmpty, 'read("a/b") must raise FileNotFoundError where no such file is'),
        (NamesTheRoot, "names() of a location that does not exist must be empty"),
        (AlwaysLocked, "is_locked() must be False where no driver is"),
        (ReadingGivesEmpty, 'reading("a/b") must raise FileNotFoundError where no such file is'),
        (CreatesWhatItReads, "Reading must create no file"),
        (WritesAtOnce, "A file must not change before the block of writing() ends"),
        (WritesNothing, "has() must be True for a file once the block of writing() has ended"),
        (ReadsTheFirst, "read() must give what was written last, b'short'"),
        (ReadingGivesTheFirst, "reading() must give what was written last, b'short'"),
        (NamesTwice, "names() must give all files once"),
        (NamesAll, 'names("level-1") must give that folder\'s files alone'),
        (HasFolders, "has() must be False for a folder"),
        (Nameless, "at() must have the file's name, for messages"),
        (CutsLargeFiles, "A file of 12,582,912 bytes must come back as it was written"),
        (WritesFoldersAtOnce, "No file may appear before writing_folder() ends"),
        (KeepsOldFiles, "writing_folder() must replace the whole folder, and leave no file of the one before"),
        (ReadsFlatFolders, "reading_folder() must give all files of the folder"),
        (WritesWhatRaised, 'An error in the block of writing("level-1/a.bin") must leave all as it was'),
        (WritesFoldersThatRaised, 'An error in the block of writing_folder("export") must leave all as it was'),
        (AppendsBytes, "append() must add one line and its newline"),
        (AppendsToTornLines, "append() must first remove a last line without its newline, which a crash left"),
        (LocksNothing, "is_locked() must be True while another holds the lock"),
        (NamesLocks, "names() must not give what the lock is made of"),
        (LocksTwice, "lock() must raise UserError while another holds it"),
        (StaysLocked, "is_locked() must be False after the block of lock()"),
    ],
)
def test_a_storage_that_breaks_a_rule_is_told_which(
    storage: type[LocalStorage], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_storage, "time", SimpleNamespace(sleep=lambda seconds: None))
    ReadsTheFirst.first.clear()
    assert rule in broken(check_storage, lambda: storage(tmp_path / "run"))
