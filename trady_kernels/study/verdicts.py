"""What a study finds of a claim: a sentence for its section, and a row of the overview of all claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trady_kernels.study.markdown import markdown


class Verdict(str):
    """A sentence on a claim, which knows the parts that it was made of.

    Attributes:
        claim: what is said, and who says it: "channels differ between tasks (TraDy)".
        where: network, task or scheme that it was looked at on; "" for all of a study.
        verdict: as :mod:`trady_kernels.study.statistics` gives it: "holds".
    """

    claim: str
    where: str
    verdict: str

    @classmethod
    def of(cls, claim: str, where: str, verdict: str, found: str) -> Verdict:
        """The sentence, with the figures ``found``."""
        begun = f"{claim[0].upper()}{claim[1:]}"
        sentence = cls(f"*{begun}*{f', {where}' if where else ''}: {verdict}, {found}.")
        sentence.claim, sentence.where, sentence.verdict = begun, where, verdict
        return sentence


def overview(sections: Mapping[str, Iterable[str]]) -> list[str]:
    """Every claim that sections have a verdict of, with a link to its section; nothing without one.

    Args:
        sections: lines by the name of the study.
    """
    rows = [
        [line.claim, line.where, f"[{name}](#trady-study-{name})", line.verdict]
        for name, lines in sections.items()
        for line in lines
        if isinstance(line, Verdict)
    ]
    return markdown(["claim", "where", "study", "verdict"], rows) if rows else []
