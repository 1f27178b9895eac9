r"""What may be wrong with a row, one small function each: it yields a sentence for each fault that it finds.

A further rule is a further function under `@rule(...)` and a test with the fault planted; the command, the page, the JSON and
`--strict` know it by that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megapsft.audit.roles import ROLE
from megapsft.audit.rows import AuditedRow, AuditedSample
from megapsft.audit.rule import Rule, rules_of
from megapsft.data.chat_template import ChatTemplate
from megapsft.rewards.answer import final_answer

MARKERS = (  # of the templates of other models, which this tokenizer may take for words
    r"<\|im_start\|>|<\|im_end\|>|<\|start_header_id\|>|<\|eot_id\|>|<start_of_turn>|<end_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|<\|(?:user|assistant|system|end|endoftext)\|>|<｜(?:User|Assistant)｜>"
)
THINK = re.compile(r"<(/?)(think|thinking)>")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
# UTF-8 that was read as Latin-1 or Windows-1252, or not at all
MOJIBAKE = re.compile("\ufffd|â€[\u0080-\uffff]?|Ã[\u0080-\u00bf\u2018-\u203a]|Â[\u00a0-\u00bf]|ï»¿")
RESTATED = 16  # characters from which a prompt at the head of its response is no accident
LESSER = ("rejected",)  # faults of what it says are why it is there


@dataclass(frozen=True, kw_only=True)
class Context:
    """What rules know beside the row."""

    template: ChatTemplate
    wants_answer: bool  # a reward of the run reads the final answer of responses
    markers: re.Pattern[str]  # of chat templates
    ending: str  # the turn terminator

    @staticmethod
    def of(template: ChatTemplate, wants_answer: bool = False) -> Context:
        """With the special tokens of this tokenizer among the markers."""
        own = [re.escape(template.spell([number])) for number in template.special_ids]
        ending = template.spell([template.terminator_id])
        return Context(template=template, wants_answer=wants_answer, markers=re.compile("|".join([*own, MARKERS])), ending=ending)


Find = Callable[[AuditedRow, Context], Iterator[str]]
ROW_RULES: dict[Rule, Find] = {}
rule = rules_of(ROW_RULES)


def trained(row: AuditedRow) -> Iterator[AuditedSample]:
    """The samples with a response that goes into training, whole or cut."""
    return (sample for sample in row.samples if sample.dropped is None and len(sample.response))


def imitated(row: AuditedRow) -> Iterator[AuditedSample]:
    """Of these what the policy is to write itself: neither the worse side of a pair, nor what it sampled."""
    return (sample for sample in trained(row) if sample.demonstration and sample.name not in LESSER)


def responses(row: AuditedRow) -> Iterator[tuple[str, str]]:
    """(name, words) of each response that stands in the file as text."""
    return ((sample.name, sample.text) for sample in row.samples if sample.text is not None)


def words(row: AuditedRow) -> Iterator[tuple[str, str]]:
    """(where, words) of every text of the row: turns of the prompt, and responses."""
    if isinstance(row.prompt, str):
        yield "prompt", row.prompt
    elif row.prompt and isinstance(row.prompt[0], dict):
        for number, message in enumerate(row.prompt, start=1):
            yield f"prompt, turn {number} ({message['role']})", message["content"]
    yield from responses(row)


@rule("refused", "The loader refuses the row: the run would not start.", "Mend the row, or take it out.")
def refused(row: AuditedRow, context: Context) -> Iterator[str]:
    if row.refused is not None:
        yield row.refused


@rule(
    "missing-terminator",
    "A response that is said to be finished does not end with a turn terminator: the policy would not learn to stop.",
    "Record the token that ended the response among its token_ids, or say finish_reason=length.",
)
def missing_terminator(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in trained(row):
        if sample.finished and not sample.truncated and sample.response[-1] not in context.template.stop_token_ids:
            yield f"{sample.name} ends with {context.template.spell(sample.response[-1:].tolist())!r}"


@rule(
    "two-terminators",
    "A response has more than one turn terminator: the policy would learn to go on after its turn.",
    "Take end-of-text tokens out of the response; the template adds the one that belongs there.",
)
def two_terminators(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in row.samples:
        count = int(np.isin(sample.response, context.template.stop_token_ids).sum())
        if count > 1:
            yield f"{sample.name} has {count}"


@rule(
    "trained-prompt",
    "Tokens of the prompt are trained: the policy would learn to write questions.",
    "Take the prompt off the head of the response.",
)
def trained_prompt(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in trained(row):
        count = int(sample.loss_mask[: sample.prompt_length].sum())
        if count:
            yield f"{sample.name}: {count} prompt tokens have a loss"
    asked = last_turn(row).strip()
    for name, text in responses(row):
        if len(asked) >= RESTATED and text.lstrip().startswith(asked):
            yield f"{name} begins with the whole prompt"


def last_turn(row: AuditedRow) -> str:
    """What the prompt asks last; empty where the file has its token ids."""
    if isinstance(row.prompt, str):
        return row.prompt
    return row.prompt[-1]["content"] if row.prompt and isinstance(row.prompt[0], dict) else ""


@rule(
    "template-twice",
    "A text holds markers of a chat template, which is put around it once more.",
    "Give the words alone, or chat messages; the template of the model is applied when the file is read.",
)
def template_twice(row: AuditedRow, context: Context) -> Iterator[str]:
    for where, text in words(row):
        response = not where.startswith("prompt")
        found = context.markers.search(text.removesuffix(context.ending) if response else text)  # which may end with its own
        if found:
            yield f"{where} holds {found[0]!r}"


@rule(
    "bos-twice",
    "The token that begins a text stands in the sequence more than once.",
    "Take it out of the text; the template writes it.",
)
def bos_twice(row: AuditedRow, context: Context) -> Iterator[str]:
    bos = context.template.tokenizer.bos_token_id
    if bos is None or bos in context.template.stop_token_ids:
        return
    for sample in row.samples:
        count = int((sample.token_ids == bos).sum())
        if count > 1:
            yield f"{sample.name} has {count} of {context.template.spell([bos])}"


@rule(
    "truncated",
    "A response is cut, so it is trained without its end and without a terminator.",
    "Raise data.max_length, or set data.overlong=drop; mend responses that were cut when they were made.",
)
def truncated(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in trained(row):
        if sample.truncated:
            yield f"{sample.name} loses {len(sample.token_ids) - sample.kept} of its {len(sample.response)} tokens"
    for sample in imitated(row):
        if sample.text is not None and "\\boxed" in sample.text and open_box(sample.text):
            yield f"{sample.name} ends inside of \\boxed{{"


def open_box(text: str) -> bool:
    """Whether braces are still open behind the last box; escaped ones do not count."""
    behind = re.sub(r"\\[\\{}]", "", text[text.rindex("\\boxed") :])
    return behind.count("{") > behind.count("}")


@rule("dropped", "The row, or a response of it, does not fit and is not trained.", "Raise data.max_length, or take it out.")
def dropped(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in row.samples:
        if sample.dropped in ("too long", "no room"):
            yield f"{sample.name}, {sample.dropped}: {len(sample.token_ids)} tokens, {sample.prompt_length} of them prompt"


@rule("empty-response", "A response has no words, so the terminator alone is trained.", "Fill it, or take the row out.")
def empty_response(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in row.samples:
        blank = sample.text is not None and not sample.text.strip()
        if blank or (len(sample.response) and np.isin(sample.response, context.template.stop_token_ids).all()):
            yield sample.name


@rule("nothing-trained", "The row goes into training without one trained token.", "Take it out, or look at its columns.")
def nothing_trained(row: AuditedRow, context: Context) -> Iterator[str]:
    known = [sample for sample in row.samples if len(sample.response)]  # not what will be sampled
    if any(sample.loss_mask.any() for sample in known):
        return
    if any(sample.dropped is None for sample in known):
        yield "no token has a loss"
    left_out = [sample.name for sample in known if sample.dropped == "left out"]
    if left_out and not all(sample.demonstration for sample in known):  # else what will be sampled is trained
        yield f"the objective leaves out {', '.join(left_out)}, and nothing else fits"


@rule(
    "think-unbalanced",
    "Tags around thoughts do not open and close in turn.",
    "Close what was opened; where the template opens the thoughts, the response begins inside of them.",
)
def think_unbalanced(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in imitated(row):
        if sample.text is None or sample.truncated:
            continue
        opened, _ = left_open(head_of_response(sample, context), [])
        still_open, fault = left_open(sample.text, opened)
        if fault or still_open:
            yield f"{sample.name}: {fault or f'<{still_open[-1]}> is not closed'}"


def head_of_response(sample: AuditedSample, context: Context) -> str:
    """What the template writes between the last turn and the response."""
    written = sample.roles[: sample.prompt_length] == ROLE["template"]
    start = sample.prompt_length - int(np.argmin(written[::-1])) if not written.all() else 0
    return context.template.spell(sample.token_ids[start : sample.prompt_length].tolist())


def left_open(text: str, opened: list[str]) -> tuple[list[str], str | None]:
    """Tags that are open behind `text`, which begins inside of those `opened`, and what is wrong before."""
    stack = list(opened)
    for slash, name in THINK.findall(text):
        if not slash and stack:
            return stack, f"<{name}> inside of <{stack[-1]}>"
        if slash and stack[-1:] != [name]:
            return stack, f"</{name}> closes nothing"
        stack = stack[:-1] if slash else [*stack, name]
    return stack, None


@rule(
    "no-final-answer",
    r"A demonstration ends with no \boxed{...} and no ####, where a reward of this run reads the answer from there.",
    r"Write the final answer as \boxed{...}, or take the row out.",
)
def no_final_answer(row: AuditedRow, context: Context) -> Iterator[str]:
    for sample in imitated(row) if context.wants_answer else ():
        if sample.text is not None and final_answer(sample.text) is None:
            yield f"{sample.name} ends with {sample.text.rstrip()[-40:]!r}"


@rule(
    "control-characters",
    "A text holds characters that are not printed: controls, marks of direction, spaces of no width.",
    "Take them out.",
)
def control_characters(row: AuditedRow, context: Context) -> Iterator[str]:
    for where, text in words(row):
        found = CONTROL.search(text)
        if found:
            yield f"{where} holds U+{ord(found[0]):04X} at character {found.start()}"


@rule("mojibake", "A text was read in another encoding than it was written in.", "Read its source as UTF-8 again.")
def mojibake(row: AuditedRow, context: Context) -> Iterator[str]:
    for where, text in words(row):
        found = MOJIBAKE.search(text)
        if found:
            yield f"{where} holds {found[0]!r} at character {found.start()}"


@rule("identical-pair", "Chosen and rejected are the same, which prefers nothing; the pair is dropped.", "Take it out.")
def identical_pair(row: AuditedRow, context: Context) -> Iterator[str]:
    if any(sample.dropped == "identical" for sample in row.samples):
        yield "chosen and rejected have the same tokens"
