"""Rows of a results table side by side: what others and we claim of them, and whether our presets win."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trady_kernels.study.markdown import markdown
from trady_kernels.study.statistics import PairedTest, Spread, p_words, paired_test
from trady_kernels.study.trainings import Series, accuracies
from trady_kernels.training.ingredients import PRESETS

#: Schemes that every other one is set beside.
REFERENCES = ("trady", "medyate")


@dataclass(frozen=True)
class Claim:
    """What somebody says of two schemes.

    Attributes:
        better, worse: the schemes.
        sentence: what is said, and who says it.
        no_more_bytes: whether it says, too, that the better one needs no more measured bytes.
    """

    better: str
    worse: str
    sentence: str
    no_more_bytes: bool = False

    def verdict(self, test: PairedTest, better_bytes: float, worse_bytes: float) -> str:
        """Of the test and of what a step of each scheme needs."""
        return "in more bytes" if self.no_more_bytes and better_bytes > worse_bytes else test.verdict


CLAIMS = (
    Claim("trady", "s-topk-random", "channels drawn anew each epoch beat channels drawn once (TraDy)"),
    Claim("trady", "d-full-random", "the top layers' channels beat those of all layers (TraDy)"),
    Claim("trady", "d-det-rgn", "random channels of the pool beat those of the largest gradient (TraDy)"),
    Claim("trady", "sparse-update", "trady beats a fixed scheme found by search (TraDy)"),
    Claim("trady", "velocity", "trady beats the selection of neurons by velocity (TraDy)"),
    Claim("medyate", "trady", "draws that follow the gradient norms beat uniform ones (MeDyate)"),
    Claim("full", "medyate", "full fine-tuning beats draws that follow the gradient norms (MeDyate)"),
    Claim(
        "late@4.5%",
        "trady",
        "the last layers beat trady in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
    Claim("frugal@5.2%", "trady", "frugal beats trady in no more measured bytes (ours)", no_more_bytes=True),
    Claim(
        "frugal@5.2%",
        "medyate@0.4%",
        "frugal beats medyate in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
    Claim(
        "frugal@5.2%",
        "medyate",
        "frugal beats medyate at the papers' budget in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
    Claim(
        "frugal@100%",
        "trady",
        "frugal with all channels of its layers beats trady in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
    Claim(
        "frugal@100%",
        "medyate",
        "frugal with all channels of its layers beats medyate in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
    *(
        Claim(row, other, f"ample beats {other} in no more measured bytes (ours)", no_more_bytes=True)
        for row in ("ample@1.8%", "ample@65%")
        for other in REFERENCES
    ),
    *(
        Claim("trady", row, "trady beats the last layers whole, in about as many measured bytes")
        for row in ("last-layers@16%", "last-layers@50%")
    ),
    Claim(
        "frugal@5.2%",
        "trady+momentum@1.9%",
        "frugal beats trady with momentum in no more measured bytes (ours)",
        no_more_bytes=True,
    ),
)


def tasks_of(series: Series) -> list[str]:
    """The tasks that a row has runs on."""
    return list(dict.fromkeys(task for task, _ in series))


def of_task(series: Series, wanted: str) -> Series:
    """A row's runs on one task."""
    return of_tasks(series, [wanted])


def of_tasks(series: Series, wanted: Sequence[str]) -> Series:
    """A row's runs on some tasks."""
    return {(task, seed): outcome for (task, seed), outcome in series.items() if task in wanted}


def against(first: Series, second: Series) -> PairedTest | None:
    """The paired test of two rows' accuracies in percent; None where they share no task and seed."""
    try:
        return paired_test(accuracies(first), accuracies(second))
    except ValueError:
        return None


def step_bytes(series: Series) -> float:
    """Mean of what a step needs; NaN where every run diverged."""
    return Spread.of([o.training_bytes for o in series.values() if not o.diverged] or [math.nan]).mean


def _of_means(first: Series, second: Series) -> str:
    """The paired test over the tasks' means, in words; nothing for a single task."""
    means = [
        {task: statistics.fmean(accuracies(of_task(series, task)).values()) for task in tasks_of(series)}
        for series in (first, second)
    ]
    p = paired_test(*means).p
    return "" if math.isnan(p) else p_words(p)


def claims_table(schemes: dict[str, Series], ends: Mapping[str, str]) -> list[str]:
    """What others and we say, beside what came of it.

    Args:
        schemes: of the table.
        ends: of a scheme, whether its learning rate is the lowest or the highest of those tried.
    """
    rows = []
    for claim in CLAIMS:
        if claim.better in schemes and claim.worse in schemes:
            better, worse = schemes[claim.better], schemes[claim.worse]
            test = against(better, worse)
            if test is not None:
                rows.append(
                    [
                        claim.sentence,
                        f"{claim.better} - {claim.worse}: {test.words}, {test.wins} of {test.pairs} won",
                        test.interval,
                        _of_means(better, worse),
                        ", ".join(
                            f"{name}: {ends[name]}" for name in (claim.better, claim.worse) if ends.get(name)
                        ),
                        claim.verdict(test, step_bytes(better), step_bytes(worse)),
                    ]
                )
    heads = ["claim", "here", "95% interval", "over tasks' means", "rate at an end of those tried", "verdict"]
    return markdown(heads, rows) if rows else []


def _beside_references(schemes: dict[str, Series]) -> list[tuple[str, str]]:
    """Each of our rows with each reference of its table."""
    ours = [name for name in schemes if name.partition("@")[0] in PRESETS]
    return [(name, other) for name, other in itertools.product(ours, REFERENCES) if other in schemes]


def presets_left_out(budget: str, schemes: dict[str, Series]) -> list[str]:
    """Our rows that need more bytes than a reference, in words."""
    return [
        f"{name} beside {other} at {budget} ({step_bytes(schemes[name]) / 2**20:.2f} and {step_bytes(schemes[other]) / 2**20:.2f} MiB)"
        for name, other in _beside_references(schemes)
        if not step_bytes(schemes[name]) <= step_bytes(schemes[other])
    ]


def presets_rows(
    budget: str, networks: Mapping[str, Sequence[str]], schemes: dict[str, Series]
) -> list[list[str]]:
    """Our rows that need no more bytes than a reference at the same budget, beside it: task by task and over all.

    Args:
        budget: of the rows.
        networks: their tasks; a row that one of them lacks, or on which it needs more bytes, is left out.
        schemes: the rows.
    """
    tasks = list(itertools.chain.from_iterable(networks.values()))
    rows = []
    for name, other in _beside_references(schemes):
        mine, theirs = schemes[name], schemes[other]
        pooled = against(mine, theirs)
        sizes = [
            (step_bytes(of_tasks(mine, here)), step_bytes(of_tasks(theirs, here)))
            for here in networks.values()
        ]
        if pooled is None or not all(own <= of_other for own, of_other in sizes):
            continue
        by_task = [against(of_task(mine, task), of_task(theirs, task)) for task in tasks]
        tests = [test for test in by_task if test is not None]
        ahead = [test for test in tests if test.difference > 0]
        rows.append(
            [
                f"{name} - {other}",
                budget,
                ", ".join(f"{own / 2**20:.1f} of {of_other / 2**20:.1f}" for own, of_other in sizes),
                *("" if test is None else test.words for test in by_task),
                f"{len(ahead)} of {len(tests)}",
                f"{sum(test.significant for test in ahead)} of {len(tests)}",
                pooled.words,
                pooled.interval,
                _of_means(mine, theirs),
            ]
        )
    return rows


def presets_table(tasks: Sequence[str], rows: list[list[str]]) -> list[str]:
    """The rows of :func:`presets_rows` of these tasks."""
    heads = ["rows", "budget", "bytes (MiB)", *tasks, "tasks ahead", "significantly"]
    return markdown([*heads, "all", "95% interval", "over tasks' means"], rows)


def presets_section(
    tasks: Sequence[str], seeds: int, rows: list[list[str]], left_out: list[str]
) -> list[str]:
    if not rows:
        return []
    return [
        f"### Do {' and '.join(PRESETS)} win?",
        "",
        f"Their rows that need no more measured bytes than {' or '.join(REFERENCES)} at the same budget: the "
        "difference in accuracy with the paired test over the seeds of each task; on how many tasks it is ahead "
        "by the mean, and by that test at the level of 5%; then the test over all pairs of task and seed with "
        "the 95% confidence interval of the difference (Student's t), and that over the tasks' means. A test over "
        f"{seeds} seeds has little power: it misses most differences that are no larger than those between seeds.",
        "",
        *presets_table(tasks, rows),
        "",
        *([f"Left out, for more bytes: {', '.join(left_out)}.", ""] if left_out else []),
    ]


def presets_everywhere(networks: Mapping[str, Sequence[str]], rows: list[list[str]]) -> list[str]:
    """One preset for everything: :func:`presets_rows` of several networks."""
    if not rows:
        return []
    return [
        f"## {' and '.join(networks)} together",
        "",
        "The same rows, same budget and same preset, on the tasks of all networks; bytes in the order of the networks. A test over "
        f"the means of {sum(map(len, networks.values()))} tasks says more of other tasks than one over those of a single network.",
        "",
        *presets_table(list(itertools.chain.from_iterable(networks.values())), rows),
        "",
    ]
