"""The figures of an analysis: for each tensor, and pooled by kind of layer and by depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltafmt.analysis import approximation, intermediate_results
from deltafmt.analysis.approximation import Approximation
from deltafmt.analysis.intermediate_results import Products
from deltafmt.analysis.norms import Norms, relative
from deltafmt.analysis.pairs import TensorPair
from deltafmt.analysis.quantized import Histogram
from deltafmt.analysis.recommendation import Recommendation, recommend
from deltafmt.analysis.spectrum import Spectrum
from deltafmt.checkpoint.name_changes import NameChange


@dataclass(frozen=True, slots=True)
class Candidate:
    """A delta file of the pair.

    Attributes:
        label: the file's name, or the method that made it.
        size: the bytes of the whole file.
    """

    label: str
    size: int


@dataclass(slots=True)
class TensorFigures:
    """The figures of one tensor.

    Attributes:
        pair: the tensor in both checkpoints.
        norms: the tensor's norms.
        products: the variance and range of its products; None if it is not the weight of a linear layer.
        spectrum, histogram: the delta's singular values and the histogram of its values; None if it is not a matrix.
        approximations: the loss of each candidate; None for a candidate that stores the tensor exactly.
    """

    pair: TensorPair
    norms: Norms
    products: Products | None = None
    spectrum: Spectrum | None = None
    histogram: Histogram | None = None
    approximations: list[Approximation | None] = field(default_factory=list)

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        pair = self.pair
        obj: dict[str, Any] = {"name": pair.name, "kind": pair.kind, "depth": pair.depth}
        obj["shape"] = list(pair.finetuned.shape)
        obj["norms"] = self.norms.to_obj()
        obj["products"] = self.products and self.products.to_obj()
        obj["singular_values"] = self.spectrum and self.spectrum.to_obj()
        obj["approximations"] = [lost and lost.to_obj() for lost in self.approximations]
        return obj


@dataclass(frozen=True, slots=True)
class Group:
    """Several tensors taken together.

    Attributes:
        label: the kind of layer, or the depth.
        members: the figures of the tensors.
    """

    label: str
    members: Sequence[TensorFigures]

    @property
    def relative_norm(self) -> float | None:
        """The norm of all deltas together over the norm of all bases together."""
        return relative(sum(one.norms.delta for one in self.members), sum(one.norms.base for one in self.members))

    @property
    def outlier_columns(self) -> int:
        """The number of columns that stand out in their matrix."""
        return sum(len(one.norms.outlier_columns) for one in self.members if one.pair.is_matrix)

    @property
    def products(self) -> list[Products]:
        """The products of those tensors that have them."""
        return [one.products for one in self.members if one.products]

    @property
    def spectra(self) -> list[Spectrum]:
        """The spectra of those matrices whose delta is not zero."""
        return [one.spectrum for one in self.members if one.spectrum and one.spectrum.squares]

    @property
    def energy(self) -> dict[int, float]:
        """The mean share of the sum of squares in the first 1, 2, 4, ... singular values, as far as all are known."""
        spectra = self.spectra
        each = [spectrum.energy for spectrum in spectra]
        limit = min((max(spectrum.energy) for spectrum in spectra if not spectrum.exact), default=math.inf)
        counts = [count for count in max(each, key=len, default={}) if count <= limit]
        # Beyond its last singular value, a delta has all of its energy.
        return {count: sum(one.get(count, 1.0) for one in each) / len(each) for count in counts}

    @property
    def effective_rank(self) -> float | None:
        """The mean effective rank; None if one of the ranks is unknown."""
        ranks = [spectrum.effective_rank for spectrum in self.spectra]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) / len(known) if known and len(known) == len(ranks) else None

    def approximation(self, candidate: int) -> Approximation | None:
        """Return a candidate's loss over the tensors that it compresses; None if it stores all of them exactly."""
        found = [lost for one in self.members if (lost := one.approximations[candidate])]
        return approximation.pooled(found) if found else None

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        candidates = range(len(self.members[0].approximations))
        return {
            "label": self.label,
            "tensors": len(self.members),
            "relative_norm": self.relative_norm,
            "outlier_columns": self.outlier_columns,
            "products": intermediate_results.summary(self.products) if self.products else None,
            "energy": {str(count): share for count, share in self.energy.items()},
            "effective_rank": self.effective_rank,
            "approximations": [(lost := self.approximation(i)) and lost.to_obj() for i in candidates],
        }


@dataclass(slots=True)
class Report:
    """All figures of an analysis.

    Attributes:
        base, finetuned: the paths of the checkpoints.
        inputs: the origin of the layers' inputs, in words.
        finetuned_bytes: the bytes of the fine-tune's weight files.
        quantization: N, M and k of the histograms.
        candidates: the delta files whose losses were measured.
        tensors: the figures of every analyzed tensor.
        skipped: the reasons for leaving out the other tensors, by name.
        names: what differs between the names and layouts of the two sides.
    """

    base: str
    finetuned: str
    inputs: str
    finetuned_bytes: int
    quantization: tuple[int, int, int]
    candidates: list[Candidate] = field(default_factory=list)
    tensors: list[TensorFigures] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    names: list[NameChange] = field(default_factory=list)

    @property
    def matrices(self) -> list[TensorFigures]:
        """The figures of the matrices."""
        return [one for one in self.tensors if one.pair.is_matrix]

    @property
    def depths(self) -> list[int]:
        """The numbers of the layers that hold matrices, ascending."""
        return sorted({one.pair.depth for one in self.matrices if one.pair.depth is not None})

    @property
    def everything(self) -> Group:
        """All matrices together."""
        return Group("all", self.matrices)

    @property
    def recommendation(self) -> Recommendation | None:
        """What to try first; None if no matrix was analyzed."""
        return recommend(self)

    def by_kind(self) -> list[Group]:
        """Return the matrices grouped by kind of layer, in the order in which kinds first appear."""
        return _groups((one.pair.kind, one) for one in self.matrices)

    def by_depth(self) -> list[Group]:
        """Return the matrices of the layers grouped by depth, ascending."""
        inside = [one for one in self.matrices if one.pair.depth is not None]
        return _groups((str(one.pair.depth), one) for one in sorted(inside, key=lambda one: one.pair.depth or 0))

    def by_band(self, kind: Group) -> list[Group]:
        """Return the matrices of one kind of layer in the low, medium and high third of the depths."""
        depths = self.depths
        size = math.ceil(len(depths) / 3)
        bands = ("low", "medium", "high")
        place = {depth: bands[i // size] for i, depth in enumerate(depths)}
        inside = [one for one in kind.members if one.pair.depth is not None]
        return [Group(band, [one for one in inside if place[one.pair.depth or 0] == band]) for band in bands]

    @property
    def histogram(self) -> Histogram:
        """The histogram of all matrices together."""
        total = Histogram()
        for one in self.tensors:
            if one.histogram:
                total.add(one.histogram)
        return total

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        n, m, bits = self.quantization
        return {
            "base": self.base,
            "finetuned": self.finetuned,
            "inputs": self.inputs,
            "finetuned_bytes": self.finetuned_bytes,
            "candidates": [{"label": one.label, "bytes": one.size} for one in self.candidates],
            "kinds": [group.to_obj() for group in self.by_kind()],
            "depths": [group.to_obj() for group in self.by_depth()],
            "histogram": {"n": n, "m": m, "bits": bits, **self.histogram.to_obj()},
            "recommendation": (found := self.recommendation) and found.to_obj(),
            "tensors": [one.to_obj() for one in self.tensors],
            "skipped": self.skipped,
            "names": [change.to_obj() for change in self.names],
        }


def _groups(labelled: Iterable[tuple[str, TensorFigures]]) -> list[Group]:
    members: dict[str, list[TensorFigures]] = {}
    for label, one in labelled:
        members.setdefault(label, []).append(one)
    return [Group(label, found) for label, found in members.items()]
