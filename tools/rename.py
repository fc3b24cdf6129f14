"""`python3 tools/rename.py OLD NEW` gives a thing another name in every file and path; docs/copying.md says when.

Rules kept here: `message service` stands for `message_service`, `Message-Service` and `MESSAGE_SERVICE`, too; only
files that git does not ignore are touched, and none that a later release replaces; the last lines list what still has
the old name. Tests: tests/docs/test_copying.py.
"""

import re
import subprocess
import sys
from pathlib import Path

KEPT = ("chassis/", "tests/chassis/", "CHANGELOG.md")
OWN = ("docs/copying.md", "tests/docs/test_copying.py", "tools/rename.py")  # about the old name, and deleted at the end
GAP = r"([\s#_-]*)"  # between two words, which may be on two lines of a comment
OURS = r"(?<![A-Za-z0-9])(?<!log_min_)(?<!lc_)"  # not the end of another word, nor of PostgreSQL's settings


def rename(text: str, old: list[str], new: list[str]) -> str:
    """`text` with `new` in place of `old`, with the same capitals and the same gaps between the words."""

    def replacement(found: re.Match[str]) -> str:
        parts = list(found.groups())  # word, gap, word, …
        parts[::2] = map(capitalise, new, parts[::2])
        return "".join(parts)

    words = GAP.join(f"((?i:{re.escape(word)}))" for word in old)
    return re.sub(rf"{OURS}{words}(?=s?(?![a-z0-9]))", replacement, text)


def capitalise(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


def files() -> list[Path]:
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], text=True)  # noqa: S607
    names = sorted({name for name in listed.split("\0") if name and not name.startswith(OWN)})
    return [path for path in map(Path, names) if path.is_file()]


def main() -> None:
    old, new = (argument.lower().split() for argument in sys.argv[1:3])
    if not old or len(old) != len(new):
        sys.exit("OLD and NEW need the same number of words, since `-` and `_` take the place of a space")
    for path in files():
        if path.as_posix().startswith(KEPT):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:  # a picture
            continue
        target = Path(rename(path.as_posix(), old, new))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target).write_bytes(rename(text, old, new).encode())
    left = re.compile(GAP.join(map(re.escape, old)), re.IGNORECASE)
    for path in files():
        text = path.read_bytes().decode(errors="replace")
        for found in left.finditer(f"{path}\n{text}"):
            line = text.count("\n", 0, max(0, found.start() - len(str(path)) - 1)) + 1
            print(f"still there: {path}:{line}: {found[0]!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main()
