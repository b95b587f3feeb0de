"""Check: one thing to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from trifold.edge.doctor.finding import Finding, fault
from trifold.edge.doctor.patient import Patient
from trifold.shared.errors import TrifoldError


@dataclass(frozen=True)
class Check:
    """`remedy` is what to do about a fault that does not say it itself.

    One that calls others `as_node` has nothing to look at where the certificate of --tls does not hold.
    """

    name: str
    examine: Callable[[Patient], Iterable[Finding]]
    remedy: str
    as_node: bool = False

    def findings(self, patient: Patient) -> Iterator[Finding]:
        """What it finds. A TrifoldError is a fault; so is any other, which does not end the examination."""
        try:
            yield from map(self._with_remedy, self.examine(patient))
        except TrifoldError as error:
            yield self._with_remedy(fault(error.message))
        except Exception as error:
            # Whatever a broken machine does to a check: the others are to be heard.
            told = f"the check itself failed: {type(error).__name__}: {error}"
            yield fault(told, "please report this with the output of `trifold version`")

    def _with_remedy(self, finding: Finding) -> Finding:
        if finding.remedy or finding.verdict in ("ok", "skipped"):
            return finding
        # Some errors say it, too, and once is enough.
        return replace(finding, detail=finding.detail.removesuffix(f"; {self.remedy}"), remedy=self.remedy)
