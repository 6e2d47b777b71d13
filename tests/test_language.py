"""Language of the code and the documents, as far as a test can hold it: CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FOLDERS = ["lfm2_fast", "kernels", "bench", "tests", "docs"]
# A docstring begins with a verb or a noun. One of a test may be a sentence with an article.
QUESTIONS = "What|Whether|Which|How|Where|Why|Who|True|What\\w+|Wh\\w+ever|However"
NOT_FIRST = {
    "tests": re.compile(f"({QUESTIONS}|And|But|Of|As|It|They|Its|Those)\\b"),
    "": re.compile(f"({QUESTIONS}|And|But|Of|As|It|They|Its|Those|A|An|The)\\b"),
}
# Words of the dialect that CONTRIBUTING forbids, or for which a plainer word exists.
DIALECT = re.compile(
    r"\b(such(?! as)|so many|who(so)?ever|whatever|wherever|whichever|likewise|likeliest|anew"
    r"|in vain|as ever|for good|at hand|under way|all the same|one another|nobody|somebody"
    r"|at the (least|most)|thereof|thereby|hereby|therein|wherein|whereof|of theirs"
    r"|passed over|held against|in any company)\b",
    re.IGNORECASE,
)
MOST_WORDS = 30

Docstrings = dict[str, dict[Path, list[str]]]


@pytest.fixture(scope="module")
def docstrings() -> Docstrings:
    """All docstrings, by folder and file."""
    found: Docstrings = {}
    for folder in FOLDERS:
        found[folder] = {}
        for file in sorted((ROOT / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            texts = [ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED)]
            found[folder][file] = [text for text in texts if text is not None]
    return found


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def comments(file: Path) -> str:
    mark = "#" if file.suffix == ".py" else "//"
    return " ".join(re.findall(rf"(?m)(?:^ *|  ){mark} (.*)", file.read_text(encoding="utf-8")))


def prose(document: str) -> str:
    """Text of a Markdown page, without code, generated tables and other tables."""
    document = re.sub(r"<!-- bench:.*?<!-- /bench -->|```.*?```", "", document, flags=re.DOTALL)
    document = re.sub(r"(?m)^(\||    ).*$", "", document)
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", document)


def sentences(text: str) -> Iterator[str]:
    """Sentences of ``text``, without indented code. Code in a line counts as one word."""
    text = re.sub(r"(?m)^    .*$", "", text)
    text = re.sub(r"``[^`]*``|`[^`]*`", "X", text)
    for paragraph in re.split(r"\n\s*\n|\n\s*[-*|] |\n\s*\d+\. ", text):
        yield from re.split(r"(?<=[.!?])[)\"']?\s+", paragraph)


def too_long(text: str) -> list[str]:
    return [
        " ".join(sentence.split())
        for sentence in sentences(text)
        if len([word for word in sentence.split() if re.search("[a-zA-Z]", word)]) > MOST_WORDS
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str, docstrings: Docstrings) -> None:
    forbidden = NOT_FIRST.get(folder, NOT_FIRST[""])
    wrong = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for file, texts in docstrings[folder].items()
        for text in texts
        if forbidden.match(text)
    ]
    assert docstrings[folder] and not wrong, "\n".join(wrong)


def test_names_of_tests_state_a_behaviour() -> None:
    named = re.compile(r"def (test_(?:what|whether|which|how|where|who)_\w+)")
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for name in named.findall(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)
    assert named.findall("def test_{}_is_wrong() -> None:".format("what"))


def test_no_sentence_is_too_long(docstrings: Docstrings) -> None:
    found = {file: texts for files in docstrings.values() for file, texts in files.items()}
    found.update({page: [prose(page.read_text(encoding="utf-8"))] for page in documents()})
    wrong = [
        f"{file.relative_to(ROOT)}: {sentence}"
        for file, texts in found.items()
        for text in texts
        for sentence in too_long(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_words_are_plain(docstrings: Docstrings) -> None:
    found = {
        file: "\n".join([*texts, comments(file)])
        for files in docstrings.values()
        for file, texts in files.items()
    }
    found.update({file: comments(file) for file in sorted((ROOT / "csrc").iterdir())})
    for page in documents():  # CONTRIBUTING quotes the words that it forbids
        found[page] = prose(re.sub(r'"[^"]*"', "", page.read_text(encoding="utf-8")))
    wrong = []
    for file, text in found.items():
        text = " ".join(re.sub("``[^`]*``|`[^`]*`", "X", text).split())
        for match in DIALECT.finditer(text):
            near = text[max(match.start() - 60, 0) : match.end() + 30]
            wrong.append(f"{file.relative_to(ROOT)}: {near}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_find_what_they_forbid() -> None:
    assert NOT_FIRST[""].match("What comes out") and NOT_FIRST[""].match("The rows")
    assert NOT_FIRST["tests"].match("Whether it is") and not NOT_FIRST["tests"].match("The rows")
    assert not NOT_FIRST[""].match("Pages of one layer")
    assert DIALECT.search("with such rows") and not DIALECT.search("words such as these")
    assert too_long("word " * 31 + ".") and not too_long("word " * 30 + ". " + "word " * 30)
    assert not too_long("`a b c` " * 30) and "row" not in prose("| a row |\n")
