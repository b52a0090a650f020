"""The tables of the study of methods, and what they say of the usual claims."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from jaxprompt.studies.baselines import Record
from jaxprompt.studies.method_costs import BARE, SEVERAL, is_frozen, median_ratio
from jaxprompt.studies.method_runs import MODEL_TUNING
from jaxprompt.studies.methods import chosen_methods, costs_run, label_of, runs_of, variants
from jaxprompt.studies.study import Records, StudyPlan, score
from jaxprompt.studies.tables import NOTHING, Table, mean_and_spread, table

Tables = list[tuple[str, Table]]


def tables(plan: StudyPlan, records: Records) -> Tables:
    """Of each task and backbone: scores, few rows, costs, and the table of introductions."""
    found: Tables = []
    for backbone in plan.backbones:
        for task in plan.tasks:
            place = Place(plan, records, backbone, task)
            group = f"{task}, {backbone}"
            inside = [v for v in variants(plan) if v.group == group]
            found.append((group, place.with_rates(table(inside, records))))
            if plan.rows:
                found.append((f"{group}: {place.metric} by number of training rows", place.few()))
            if place.costs:
                found.append((f"{group}: costs", place.cost_table()))
                found.append((f"{group}: what is said in introductions", place.introduction()))
            if place.skipped:
                found.append((f"{group}: left out", [["", "reason"], *place.skipped]))
    return found


class Place:
    """What is known of one task on one backbone."""

    def __init__(self, plan: StudyPlan, records: Records, backbone: str, task: str) -> None:
        self._plan, self._records = plan, records
        self._backbone, self._task = backbone, task
        self.methods = chosen_methods(plan)
        self.costs: Record = records.get(costs_run(plan, backbone, task).key, {})
        self.metric = plan.tasks[task].metrics[0]

    def records(self, method: str, rows: int | None = None) -> list[Record]:
        """Of the seeds that are complete."""
        runs = runs_of(self._plan, self._backbone, self._task, method, rows)
        return [self._records[run.key] for run in runs if run.key in self._records]

    def scores(self, method: str, rows: int | None = None) -> list[float]:
        values = map(score, self.records(method, rows))
        return [value for value in values if value is not None]

    @property
    def skipped(self) -> list[list[str]]:
        """Methods that the backbone does not allow, with the reason."""
        reasons = {m: r["skipped"] for m in self.methods for r in self.records(m) if "skipped" in r}
        return [[label_of(method), reason] for method, reason in reasons.items()]

    def first(self, method: str, key: str) -> float | None:
        """A figure of the first complete seed."""
        return next((r[key] for r in self.records(method) if r.get(key) is not None), None)

    def mean(self, method: str, key: str) -> float | None:
        """The mean of a figure over seeds."""
        values = [r[key] for r in self.records(method) if r.get(key) is not None]
        return statistics.mean(values) if values else None

    def with_rates(self, lines: Table) -> Table:
        """The table with the learning rate that was chosen for each method."""
        rates = [self.first(method, "rate") for method in self.methods]
        cells = ["learning rate", *map(_number, rates)]
        cells += [""] * (len(lines) - len(cells))
        return [[*line, cell] for line, cell in zip(lines, cells, strict=True)]

    def few(self) -> Table:
        """A line for each method, a column for each number of training rows."""
        counts = [*self._plan.rows, None]
        lines = [["", *("all" if n is None else f"{n} rows" for n in counts)]]
        for method in self.methods:
            lines.append(
                [label_of(method), *(mean_and_spread(self.scores(method, n)) for n in counts)]
            )
        return lines

    # -- costs

    @property
    def reference(self) -> str:
        """The method whose steps those of others are compared with."""
        known = self.costs["step_seconds"]
        return MODEL_TUNING if MODEL_TUNING in known else next(iter(known))

    def step_ratio(self, method: str) -> tuple[float, float, float] | None:
        known = self.costs["step_seconds"]
        return median_ratio(known[method], known[self.reference]) if method in known else None

    def answer_ratio(self, kind: str, method: str) -> tuple[float, float, float] | None:
        """The time of an answer, times that of the bare backbone; kind: alone or mixed."""
        known = self.costs[f"{kind}_seconds"]
        if not is_frozen(method):  # another backbone, of the same size; it answers its own rows
            times = self.costs["members"] if kind == "mixed" else 1
            both = zip(self.costs["alone_seconds"][BARE], known[BARE], strict=True)
            ratios = [times * alone / bare for alone, bare in both]
            return (statistics.median(ratios), min(ratios), max(ratios)) if times > 1 else (1, 1, 1)
        return median_ratio(known[method], known[BARE]) if method in known else None

    def memory(self, method: str) -> float | None:
        return self.costs["memory"].get(method, {}).get("total")

    def cost_table(self) -> Table:
        """A line for each method, and one for a batch with members of several."""
        count = self.costs["members"]
        of = label_of(self.reference)
        head = ["", "trained parameters", "bytes stored", "memory of a step", "a step, s"]
        head += [f"a step / {of}", "an answer / bare", f"a batch of {count} members / bare"]
        lines = [head]
        for method in self.methods:
            seconds = self.costs["step_seconds"].get(method)
            lines.append([
                label_of(method),
                _count(self.first(method, "trainable_parameters")),
                _size(self.first(method, "bytes")),
                _size(self.memory(method)),
                NOTHING if seconds is None else f"{statistics.median(seconds):.3f}",
                _ratio(self.step_ratio(method)),
                _ratio(self.answer_ratio("alone", method)),
                _ratio(self.answer_ratio("mixed", method)),
            ])  # fmt: skip
        if SEVERAL in self.costs["mixed_seconds"]:
            ratio = _ratio(self.answer_ratio("mixed", SEVERAL))
            names = ", ".join(self.costs["mixed_methods"])
            lines.append([f"in one batch: {names}", *[""] * 6, ratio])
        return lines

    def introduction(self) -> Table:
        """What is trained, kept, held, stored, loaded, waited for and forgotten."""
        head = ["", "trained parameters", "the model", "memory of a step", "storage of a task"]
        head += ["switching the task", "an answer", "forgetting while on", "forgetting when off"]
        lines = [head]
        whole = self.first(self.methods[0], "parameters")
        for method in self.methods:
            trained = self.first(method, "trainable_parameters")
            share = "" if not (whole and trained) else f" ({trained / whole:.2%})"
            lines.append([
                label_of(method),
                f"{_count(trained)}{share}",
                "stays as it is" if is_frozen(method) else "is another one",
                _size(self.memory(method)),
                _size(self.first(method, "bytes")),
                self._switching(method),
                _ratio(self.answer_ratio("alone", method)),
                _signed(self._forgetting(method)),
                "0" if is_frozen(method) else "cannot be off",
            ])  # fmt: skip
        return lines

    def _switching(self, method: str) -> str:
        """The time to load another task's, and whether a batch may have both."""
        seconds = self.mean(method, "load_seconds")
        loading = NOTHING if seconds is None else f"{1000 * seconds:,.0f} ms"
        return f"{loading}, or none in a mixed batch" if is_frozen(method) else loading

    def _forgetting(self, method: str) -> float | None:
        """How much the loss of a token of other text has grown, in nats."""
        tuned, bare = self.mean(method, "text_loss"), self.mean(method, "untuned_text_loss")
        return None if tuned is None or bare is None else tuned - bare


def notes(plan: StudyPlan) -> list[str]:
    """How the figures of the tables were measured."""
    return [
        "Every method has the same rows and steps, and tries three learning rates. The mean over "
        "seeds on validation rows chooses one. If the best is the highest or the lowest, two more "
        "are tried beyond it, and again two if need be. Seeds of few rows have rows of their own, "
        "drawn in turn from each label.",
        "A step's memory is that of XLA's compiler: weights, state, batch and temporaries. Times "
        "are of one process in which methods take turns: the median of the rounds' ratios, with "
        "the least and the largest. An answer is of one row, a batch of as many rows as members, "
        "each row with another member; full fine-tuning answers them one model after the other.",
        "Forgetting is the growth of the loss on text of another task, in nats a token, with what "
        "was tuned still on. What is switched off by request has forgotten nothing.",
    ]


def summary(plan: StudyPlan, records: Records) -> list[str]:
    """Whether prompts are the cheapest, by each kind of cost."""
    sentences = []
    for backbone in plan.backbones:
        for task in plan.tasks:
            place = Place(plan, records, backbone, task)
            for what, cost in _costs(place).items():
                known = {m: x for m in place.methods if (x := cost(m)) is not None}
                if "prompt-tuning" not in known or len(known) < 2:
                    continue
                least = min(known, key=lambda method: known[method])
                holds = "holds" if least == "prompt-tuning" else "does not hold"
                other = "" if holds == "holds" else f"; {label_of(least)} has less"
                sentences.append(
                    f"{task}, {backbone}: a prompt has the least {what}: {holds} here{other}."
                )
    return sentences


def _costs(place: Place) -> Mapping[str, Callable[[str], float | None]]:
    costs: dict[str, Callable[[str], float | None]] = {
        "trained parameters": lambda method: place.first(method, "trainable_parameters"),
        "storage": lambda method: place.first(method, "bytes"),
    }
    if place.costs:
        middle = lambda ratio: None if ratio is None else ratio[0]
        costs |= {
            "memory of a step": place.memory,
            "time of a step": lambda method: middle(place.step_ratio(method)),
            "time of an answer": lambda method: middle(place.answer_ratio("alone", method)),
        }
    return costs


# ---- numbers as text


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.3f}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _size(value: float | None) -> str:
    """Bytes in the largest unit of which there is one.

    >>> _size(1536), _size(3 * 2**20)
    ('1.5 KiB', '3.0 MiB')
    """
    if value is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.1f} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:,.1f} GiB"


def _ratio(ratio: Sequence[float] | None) -> str:
    """The median with the least and the largest."""
    if ratio is None:
        return NOTHING
    middle, least, largest = ratio
    spread = "" if least == largest else f" ({least:.2f} to {largest:.2f})"
    return f"{middle:.2f}{spread}"
