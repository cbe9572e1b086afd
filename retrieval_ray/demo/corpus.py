"""Build the demo corpus from the documentation that ships with the running Python.

Two sources: the language reference topics in ``pydoc_data.topics`` and the docstrings of the
standard library's public modules, classes, functions and methods. A passage's id is the name of
what it documents (``json.dumps``, ``str.split``, ``topic:with``), with ``#2``, ``#3`` ... for the
further pieces of a long text, so ids stay the same on every patch release.
"""

import importlib
import inspect
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from retrieval_ray.errors import UserError

WORDS_PER_PASSAGE = 130  # about 200 word pieces: fits the 256-token window of small encoders
MIN_CHARS = 40  # "See help(type(self))." and the like say nothing

# Public, on every platform, importable without side effects.
MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code
codecs collections collections.abc colorsys compileall concurrent.futures configparser contextlib
contextvars copy copyreg cProfile csv ctypes dataclasses datetime decimal difflib dis doctest email
email.message email.policy email.utils email.parser email.headerregistry enum errno faulthandler
filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip
hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib
importlib importlib.abc importlib.metadata importlib.resources importlib.util inspect io ipaddress
itertools json keyword linecache locale logging logging.config logging.handlers lzma mailbox math
mimetypes mmap multiprocessing multiprocessing.pool multiprocessing.shared_memory netrc numbers
operator os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile
pstats py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched secrets select
selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap
threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata
unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings
wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util
wsgiref.validate xml.dom xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.handler
xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
""".split()


def passages() -> Iterator[tuple[str, str, str]]:
    """Yield ``(passage_id, title, text)`` in a fixed order, ids unique.

    Built in a fresh Python: Ray, torch and others replace functions of the standard library, whose
    documentation would be lost here.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _main; _main()"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True)
    if done.returncode:
        raise UserError(f"the demo corpus cannot be built: {done.stderr.decode()}")
    rows: list[tuple[str, str, str]] = [tuple(row) for row in json.loads(done.stdout)]
    yield from rows


def _passages() -> Iterator[tuple[str, str, str]]:
    """Yield ``(passage_id, title, text)`` in a fixed order, ids unique.

    Raises ``UserError`` where Python was started without docstrings (``-OO``).
    """
    if not json.dumps.__doc__:  # stripped by -OO
        raise UserError(
            "the demo corpus is made of docstrings, and this Python has none: "
            "run without -OO and without PYTHONOPTIMIZE=2"
        )
    seen_ids: set[str] = set()
    seen_texts: set[str] = set()
    for name, text in [*_topics(), *_docstrings()]:
        if name in seen_ids or text in seen_texts:
            continue
        seen_ids.add(name)
        seen_texts.add(text)
        title = name.removeprefix("topic:")
        for number, piece in enumerate(split(text), start=1):
            yield (name if number == 1 else f"{name}#{number}"), title, piece


def split(text: str, words: int = WORDS_PER_PASSAGE) -> list[str]:
    """Cut a text at paragraph ends into pieces of about ``words`` words; white space is folded."""
    pieces: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        folded = paragraph.split()
        if not folded:
            continue
        if pieces[-1] and len(pieces[-1]) + len(folded) > words:
            pieces.append([])
        pieces[-1].extend(folded)
        while len(pieces[-1]) > words * 3 // 2:  # one very long paragraph
            head, tail = pieces[-1][:words], pieces[-1][words:]
            pieces[-1:] = [head, tail]
    return [" ".join(piece) for piece in pieces if piece]


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = re.sub(r"^[*=\-~^\"']{3,}$", "", topics[name], flags=re.MULTILINE)  # underlines
        yield f"topic:{name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    for module_name in MODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated modules say so on import
                module = importlib.import_module(module_name)
        except ImportError:  # a Python built without it
            continue
        if module_name != "builtins":
            yield from _documented(module_name, module)
        for name, value in _public_members(module):
            qualified = name if module_name == "builtins" else f"{module_name}.{name}"
            if inspect.isclass(value):
                yield from _documented(qualified, value)
                for attribute, method in sorted(vars(value).items()):
                    if not attribute.startswith("_"):
                        yield from _documented(f"{qualified}.{attribute}", method)
            elif inspect.isroutine(value):
                yield from _documented(qualified, value)


def _public_members(module: ModuleType) -> list[tuple[str, object]]:
    exported = getattr(module, "__all__", None)
    names = exported if exported else [name for name in vars(module) if not name.startswith("_")]
    members = []
    for name in sorted(set(names)):
        value = getattr(module, name, None)
        home = getattr(value, "__module__", None)
        # A name another documented module exports is documented there.
        imported = not exported and home is not None and home != module.__name__
        if not (imported and home in MODULES):
            members.append((name, value))
    return members


def _documented(name: str, value: object) -> Iterator[tuple[str, str]]:
    own = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    doc = getattr(own, "__doc__", None)
    if isinstance(doc, str) and len(doc.strip()) >= MIN_CHARS:
        yield name, inspect.cleandoc(doc)


def _main() -> None:
    print(json.dumps(list(_passages())))
