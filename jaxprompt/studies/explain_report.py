"""The page of a prompt's explanation: figures, tables, and what they say in sentences."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.evaluation.explain import figures
from jaxprompt.evaluation.explain.importance import ROWS_OF_GRADIENTS, Importance
from jaxprompt.evaluation.explain.kinship import Kinship
from jaxprompt.evaluation.explain.layers import Lens
from jaxprompt.evaluation.explain.tokens import TokenAttributions
from jaxprompt.evaluation.explain.words import AS_TEXT, BY_COSINE, RANDOM_WORDS, SOFT, Projected
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.json_file import read_json
from jaxprompt.studies.explain import Explained, Probes
from jaxprompt.studies.report import Section, to_html, to_markdown
from jaxprompt.studies.study import Table

MARK = "explained"  # the key that tells a report of ours
ALPHA = 0.05


def check_folder(out: Path) -> None:
    """Refuse a directory for the report that holds something else, before any work is done."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; name a directory with --output.")
    if (out / "report.md").exists() or (out / "report.html").exists():
        try:
            ours = MARK in read_json(out / "report.json")
        except UserError:
            ours = False
        if not ours:
            raise UserError(
                f"{str(out)!r} holds another report, which would be lost; choose another --output."
            )


def write_explained(out: Path, explained: Explained) -> Path:
    """Write report.md, .html and .json, and figures/*.png; the path of the HTML page."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    facts = "; ".join(f"{key}: {value}" for key, value in explained.facts.items())
    sections = [Section("What was explained", [f"{facts[:1].upper()}{facts[1:]}.",
                "Controls are random vectors, each as long as the prompt's at its position.",
                *explained.notes], [], [], None)]  # fmt: skip
    folder = out / "figures"
    if explained.importance is not None:
        sections.append(_importance(explained.importance, folder / "importance.png"))
    if explained.tokens is not None:
        sections.append(_tokens(explained.tokens, folder / "tokens.png"))
    if explained.lens is not None:
        sections.append(_lens(explained.lens, folder / "lens.png"))
    if explained.words is not None:
        sections.append(_words(explained.words, folder / "words.png"))
    if explained.probes is not None:
        sections.append(_probes(explained.probes, folder / "probes.png"))
    values = {MARK: explained.name, **explained.to_json()}
    return _write(out, sections, f"Why {explained.name} answers as it does", values)


def write_kinship(out: Path, found: Kinship, values: Mapping[str, object]) -> Path:
    """The page of how alike prompts are; their own pages are in folders beside it."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figure = out / "figures" / "similarity.png"
    figures.draw_kinship(found, figure)
    table: Table = [["", *found.names]]
    for name, row in zip(found.names, found.cka, strict=True):
        table.append([name, *(f"{value:.3f}" for value in row)])
    text = (
        "The cosine is that of the two means over vectors. Linear CKA compares what the vectors "
        "span; neither their order nor their number matters. Prompts that are alike are "
        "neighbours (average linkage of 1 - CKA)."
    )
    section = Section("How alike the prompts are", [text], [("Linear CKA", table)], [
        f"A prompt and random vectors as long as another's have a CKA of {found.random_cka:.3f} "
        f"and a cosine of {found.random_cosine:.3f} on average.",
    ], figure)  # fmt: skip
    return _write(out, [section], "How alike prompts are", {MARK: found.names, **values})


def _write(out: Path, sections: list[Section], title: str, values: Mapping[str, object]) -> Path:
    write_atomically(out / "report.md", to_markdown(sections, (), title))
    write_atomically(out / "report.html", to_html(sections, (), title))
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "report.json", text)
    return out / "report.html"


def _importance(found: Importance, figure: Path) -> Section:
    figures.draw_importance(found, figure)
    tuned, random = found.tuned, found.random
    order = np.argsort(-tuned.left_out)[:10]
    table: Table = [["position", "left out", "gate", "integrated gradients"]]
    for i in order:
        values = tuned.left_out[i], tuned.gate[i], tuned.integrated[i]
        table.append([str(i), *(f"{value:+.4f}" for value in values)])
    paragraphs = [
        f"Measured on {found.rows[0]} rows, in nats of log p of the right label (among labels); "
        f"vectors were then deleted on {found.rows[1]} other rows. Left out: by how much log p "
        "falls without the vector. Gate: mean absolute gradient of a gate before it. Integrated "
        "gradients: from the mean word to the vector. Gates and integrated gradients are of the "
        f"first {min(ROWS_OF_GRADIENTS, found.rows[0])} of these rows.",
        f"Integrated gradients add up to the difference of the outputs with a mean gap of "
        f"{tuned.gap:.2g} of {tuned.difference:.2g} nats, at {tuned.points} points.",
    ]
    noise = float(np.abs(random.left_out).max())
    beyond = int((np.abs(tuned.left_out) > noise).sum())
    area = lambda curve: float(curve.accuracy.mean())
    high, low = area(found.highest_first), area(found.lowest_first)
    drawn = found.random_orders.accuracy.mean(axis=1)
    findings = [
        f"{beyond} of {len(tuned.left_out)} vectors change log p by more than any of the random "
        f"prompt's vectors does ({noise:.3f} nats).",
        f"Mean accuracy over the deletion curve: {high:.3f} with the most important vectors "
        f"deleted first, {low:.3f} with the least important first, {drawn.min():.3f} to "
        f"{drawn.max():.3f} in random orders. {_deletion_verdict(high, low, drawn)}",
    ]
    return Section("Which vectors matter", paragraphs,
                   [("The ten vectors that matter most", table)], findings, figure)  # fmt: skip


def _deletion_verdict(high: float, low: float, random: np.ndarray) -> str:
    if high < random.min() and low > random.max():
        return "So the measure tells which vectors other rows need."
    if high < random.min():
        return (
            "So other rows need the vectors at the top of the order. It is not shown that they do "
            "without those at its end."
        )
    if low > random.max():
        return (
            "So other rows do without the vectors at the end of the order. It is not shown that "
            "they need those at its top."
        )
    return "So on these rows the order of importance is no better than a random one."


def _tokens(found: TokenAttributions, figure: Path) -> Section:
    figures.draw_tokens(found, figure)
    text = (
        "Integrated gradients of log p of the right label, from the mean word to each word. Blue "
        "words speak for the label, red ones against it. Each form is divided by the largest of "
        "its own attributions, which is beside its name, in nats."
    )
    gaps = ", ".join(
        f"{gap:.2g} of {size:.2g}" for gap, size in zip(found.gaps, found.differences, strict=True)
    )
    findings = [
        f"Attributions with and without the prompt have a mean cosine of {found.agreement:.2f} "
        f"({found.agreement_random:.2f} with a random prompt and without any).",
        f"Mean gaps of completeness (with the prompt, without, random), in nats: {gaps}.",
    ]
    return Section("Which words the answer depends on", [text], [], findings, figure)


def _lens(found: Mapping[str, Lens], figure: Path) -> Section:
    figures.draw_lens(found, figure)
    own = found["prompt"]
    table: Table = [["layer", "with the prompt", "without it", "random prompt",
                     "likeliest tokens with the prompt"]]  # fmt: skip
    for layer in range(len(own.rank)):
        top = ", ".join(f"{token} {share:.0%}" for token, share in own.top[layer])
        scores = [f"{lens.accuracy[layer]:.3f}" for lens in found.values()]
        table.append([str(layer + 1), *scores, top])
    text = (
        "The state where the answer begins, behind each layer, goes through the final norm and the "
        "output matrix. Accuracy: no label's first token is likelier than the right one's."
    )
    return Section("What each layer would answer", [text],
                   [("Accuracy behind each layer", table)], [], figure)  # fmt: skip


def _words(found: list[Projected], figure: Path) -> Section:
    figures.draw_words(found, figure)
    table: Table = [["in place of the vectors", "accuracy", "log p", "p against the vectors",
                     "words"]]  # fmt: skip
    for one in found:
        p = "" if one.p is None else f"{one.p:.3g}"
        words = "" if one.text is None else one.text[:100]
        table.append([one.name, f"{one.accuracy:.3f}", f"{one.log_p:.3f}", p, words])
    text = (
        "The vectors are replaced by the words nearest to them (Khashabi et al. 2022). If these "
        "words did what the vectors do, they would score as much. p is McNemar's, of the same rows."
    )
    return Section("Whether the nearest words say it", [text], [("Accuracy", table)],
                   [words_verdict(found)], figure)  # fmt: skip


def words_verdict(found: list[Projected]) -> str:
    """Whether the nearest words explain the prompt, in a sentence."""
    by_name = {one.name: one for one in found}
    soft, random = by_name[SOFT], by_name[RANDOM_WORDS]
    best = max(by_name[BY_COSINE], by_name[AS_TEXT], key=lambda one: one.accuracy)
    scores = (
        f"The prompt scores {soft.accuracy:.3f}, its nearest words {best.accuracy:.3f}, random "
        f"words {random.accuracy:.3f}"
    )
    if best.p is not None and best.p >= ALPHA:
        return f"{scores}: the nearest words cannot be told apart from the prompt on these rows."
    if best.accuracy >= soft.accuracy:
        return f"{scores}: the nearest words score no less than the prompt."
    return f"{scores}: the prompt is wayward, its nearest words do not say what it does."


def _probes(found: Probes, figure: Path) -> Section:
    figures.draw_probes(found.text, found.answer, found.type, figure)
    table: Table = [["state, prompt", "layer", "task", "control", "selectivity"]]
    for place, probes in (("words", found.text), ("answer", found.answer)):
        for form, probe in probes.items():
            values = zip(probe.task, probe.control, probe.selectivity, strict=True)
            for layer, each in enumerate(values, 1):
                scores = [f"{value:.3f}" for value in each]
                table.append([f"{place}, {figures.NAMES[form]}", str(layer), *scores])
    some = found.text["prompt"]
    text = (
        "Multinomial logistic regressions on the states behind each layer; two thirds of the rows "
        "train them, the others judge them. The control task (Hewitt and Liang 2019) gives "
        f"{found.type} a random label; the majority is {some.majority:.3f} in the task and "
        f"{some.control_majority:.3f} in the control task. Selectivity is task less control."
    )
    return Section("What can be read from the states", [text], [("Probes", table)], [], figure)
