"""The mechanical part of STYLE.md: how docstrings begin, words to avoid, commit subjects.

python -m tests.test_language pipeline/kafka    # lists what is wrong there
python -m tests.test_language --subject FILE    # checks a commit message (pre-commit)
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (
    "model", "pipeline", "benchmarks", "deploy", "docs", "examples", "requirements", "tests",
)  # fmt: skip
PROSE = ("*.md", "docs/**/*.md", "examples/**/*.md")

NO_OPENING = re.compile(r"(Of|So|By|With|From|For|What|That|Whoever)\b")
"""A docstring begins with an imperative or a noun phrase, and stands alone."""

AVOIDED = re.compile(r"\b(anew|sought|likewise|shall|so many|a hidden)\b(?! state| size)", re.I)
SUBJECT_MAX = 72
NO_IMPERATIVE = re.compile(
    r"(A|An|The|Each|Every|Fix|Fixed|Added|Adds|Updated|Updates|What|Where|When|Whoever)\s"
)
SINCE = "66a29eb"
"""The last commit before the rule; older subjects stay as they are."""


def python_files(folder: Path) -> Iterator[Path]:
    """Source files under a folder, or the file itself."""
    yield from [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def wrong_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and complaint for each docstring, comment or text that breaks a rule."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                if found := NO_OPENING.match(text.strip()):
                    yield node.lineno, f"a docstring begins with {found[1]!r}"
            case _:
                continue
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield from avoided(token.string, token.start[0])


def avoided(text: str, first_line: int = 1) -> Iterator[tuple[int, str]]:
    """Line and complaint for each word that a reader would stumble over."""
    for found in AVOIDED.finditer(text):
        yield first_line + text.count("\n", 0, found.start()), f"the word {found[0]!r}"


def complaints(folders: list[Path]) -> list[str]:
    """Lines ``file:line: complaint``."""
    return [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for folder in folders
        for file in python_files(folder)
        if file != Path(__file__).resolve()
        for line, what in wrong_in(file.read_text())
    ]


@pytest.mark.slow
def test_docstrings_and_comments_keep_the_rules_of_style_md() -> None:
    found = complaints([ROOT / folder for folder in PYTHON])

    assert not found, "\n" + "\n".join(found)


def test_documents_avoid_the_words_of_style_md() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for pattern in PROSE
        for file in sorted(ROOT.glob(pattern))
        if file.name != "STYLE.md" and file.parent.name != "reference"  # written from the code
        for line, what in avoided(file.read_text())
    ]

    assert not found, "\n" + "\n".join(found)


def test_subjects_of_commits_are_short_and_imperative() -> None:
    git = subprocess.run(
        ["git", "log", "--no-merges", "--format=%h %s", f"{SINCE}..HEAD"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if git.returncode:  # no history: a shallow clone, or a source archive
        return
    wrong = [line for line in git.stdout.splitlines() if wrong_subject(line.partition(" ")[2])]

    assert not wrong, "\n" + "\n".join(wrong)


def wrong_subject(subject: str) -> bool:
    """Whether a commit's subject is too long or no imperative."""
    return len(subject) > SUBJECT_MAX or bool(NO_IMPERATIVE.match(subject))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ('"""Of a topic whose id nobody told."""', "begins with 'Of'"),
        ('X = 1\n"""So many at once."""', "begins with 'So'"),
        ("x = 1  # it starts anew", "'anew'"),
        ('raise ValueError("a hidden is none")', "'a hidden'"),
    ],
)
def test_what_breaks_a_rule_is_found(source: str, what: str) -> None:
    assert any(what in complaint for _, complaint in wrong_in(source))


def test_plain_sentences_are_let_through() -> None:
    assert not list(wrong_in('"""Give a hidden state of size n."""\nX = 1  # begin again\n'))
    assert not wrong_subject("Seek to the group's start offset explicitly")
    assert wrong_subject("Where a group begins is asked for, and then it seeks there")


def test_the_hook_refuses_a_message_with_a_wrong_subject(tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_text("The log is read back\n\nBecause it must be.\n")
    assert "commit subject" in (subject_complaint(message) or "")
    message.write_text("Read the log back\n\n# a comment of git\n")
    assert subject_complaint(message) is None


def subject_complaint(message: Path) -> str | None:
    """Say what is wrong with the subject of a commit message; None if it is right."""
    subject = message.read_text().partition("\n")[0]
    if not wrong_subject(subject):
        return None
    return f"commit subject: write an imperative of at most {SUBJECT_MAX} characters: {subject!r}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        sys.exit(subject_complaint(Path(sys.argv[2])))
    paths = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT / name for name in PYTHON]
    print("\n".join(complaints(paths)))
