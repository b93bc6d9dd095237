#!/usr/bin/env python3
"""Find phrases of the project's former private idiom, and print the plain wording.

Checked are docstrings, comments and string literals of the package, docstrings and comments of all other
Python files, and the Markdown pages. Usage: ``.ci/words.py [--count] [path ...]``, where paths are files or
folders; ``--count`` prints a number per folder. The exit status is 1 if a phrase was found.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Phrase -> plain wording. Phrases are narrow: ordinary technical English must not match.
IDIOM = {
    # pronouns instead of nouns
    r"whoever": "a noun, such as 'the caller' or 'code that reads the weight'",
    r"everybody|somebody": "a noun, such as 'the caller' or 'another process'",
    r"nobody": "a noun with 'no', such as 'no process', or 'without synchronization'",
    r"(that|those) of (it|them|another|others|the same|which)": "the noun",
    r"is of (another|others)": "'belongs to another', 'has another'",
    r"what (is|was|there is) (there|already there|to be)": "the noun, such as 'the existing file'",
    r"what (is|are) (said|asked|known|not) of": "the noun",
    # states
    r"(then|left|stays?|leaves?|are|is) as (it|they) (was|were|is|are)": "'is unchanged', 'is restored'",
    r"as (it|they) stands?": "'current', 'unchanged'",
    r"leaves? with the|leave with what|that there were": "'restore ... after the block'",
    r"(?<!there\s)(is|are|was|were) no (?!longer|more|less|fewer|better|worse|need)[a-z]+": "'is not a'",
    r"none such": "'no such ...'",
    r"lest": "'so that ... not'",
    r"but for": "'except', 'without'",
    # verbs
    r"anew": "'again', or a verb with re-: re-estimate, rebuild, restart",
    r"go(es)? on (with|where|from|as|until|when|alone)": "'resume', 'continue'",
    r"(to|and|can|could) go on(?! the| a)": "'resume', 'continue'",
    r"takes? leave": "'exit', 'end'",
    r"takes? (it|them|a wish) back": "'undo', 'decode', 'remove'",
    r"a wish|no wish|the wish|wishes": "'setting', 'requirement'",
    r"mends?|mended": "'fix', 'patch'",
    r"comes? to (lie|where)": "'is written to', 'reaches'",
    r"comes? through": "'propagates'",
    r"tells? of": "'reports'",
    r"(?-i:Tell) whether": "'Return True if'",
    r"(?-i:See) (that|whether)|and sees? that": "'Check that'",
    r"says? of (a|the|it|itself|its|them|themselves)": "'define', 'describe'",
    r"asks? for (different|other) things|asks? for something else": "'has different settings'",
    r"brings? (it |them |\w+ )?along": "'contain', 'include'",
    r"looked at (as|in one go)": "'viewed as', 'processed at once'",
    # fillers
    r"(if|as) need be": "'if necessary'",
    r"at hand": "'available', 'known'",
    r"in the (course|midst) of": "'during'",
    r"least of all": "'in particular'",
    r"of one's own": "'your own ...'",
    r"a \w+ of its own": "'its own ...', 'a separate ...'",
    r"(of|by|in|along|into) (each of )?so many|every so many(-th)?": "'of n', 'every n-th'",
    r"made aside|makes? \w+ \w+ aside": "'temporary file'",
    r"as far as (can be|they are|it has)": "'if'",
    r"(whatever|all|as often as) it likes": "'any ...'",
    r"over and over|for ever": "'repeatedly', 'forever'",
    r"over at once": "'returns immediately'",
    r"amid|hitherto|thereby|whence": "'within', 'so far', 'by this'",
}
# A phrase may be broken over lines, and a line may begin with the mark of a comment.
_PATTERNS = {
    re.compile(rf"(?<![\w-])(?:{phrase})(?![\w-])".replace(" ", r"[\s#]+"), re.IGNORECASE): plain
    for phrase, plain in IDIOM.items()
}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each passage to check."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    is_package = "nni_jackpot" in path.parts
    for node in ast.walk(ast.parse(source)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        constant = node.value if is_docstring else node
        if (
            isinstance(constant, ast.Constant)
            and isinstance(constant.value, str)
            and (is_package or is_docstring)
        ):
            yield constant.lineno, constant.value
    last, block = 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if block and line != last + 1:
                yield last - block.count("\n"), block
                block = ""
            last, block = line, f"{block}\n{token.string}" if block else token.string
    yield last - block.count("\n"), block


def findings_in(path: Path) -> set[tuple[int, str, str]]:
    """Return the line, the phrase and the plain wording of each finding in a file."""
    return {
        (line + text.count("\n", 0, found.start()), " ".join(found[0].replace("#", " ").split()), plain)
        for line, text in texts_of(path)
        for pattern, plain in _PATTERNS.items()
        for found in pattern.finditer(text)
    }


def main() -> int:
    """Print the findings, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="print the number of findings per folder")
    names = (
        "nni_jackpot",
        "benchmarks",
        "examples",
        "tests",
        "docs",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    )
    parser.add_argument("paths", type=Path, nargs="*", default=[ROOT / name for name in names])
    args = parser.parse_args()
    files = [
        path
        for given in args.paths
        for path in ([given] if given.is_file() else sorted(given.rglob("*")))
        if path.suffix in (".py", ".md")
    ]
    found = {path: findings_in(path) for path in files}
    if args.count:
        counts: Counter[Path] = Counter()
        for path, findings in found.items():
            counts[path.parent] += len(findings)
        print(*(f"{count:5} {folder}" for folder, count in sorted(counts.items()) if count), sep="\n")
    else:
        for path, findings in found.items():
            for line, phrase, plain in sorted(findings):
                print(f"{path}:{line}: '{phrase}': write {plain}")
    print(sum(map(len, found.values())), "phrases of the former idiom", file=sys.stderr)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
