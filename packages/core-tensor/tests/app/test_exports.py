import subprocess
import sys
import textwrap

import pytest

PACKAGE = """
from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from zoo import cats
    from zoo.birds.song import sing as sing, VOLUME

__all__ = ["VOLUME", "cats", "sing"]
__getattr__, __dir__, _ = lazy(__name__)
"""


@pytest.fixture
def zoo(tmp_path):
    for path, text in {
        "zoo/__init__.py": PACKAGE,
        "zoo/cats.py": "print('cats imported')",
        "zoo/birds/__init__.py": "",
        "zoo/birds/song.py": "print('song imported')\nVOLUME = 11\ndef sing(): return 'la'",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def run(code):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split("\n")[:-1]

    return run


def test_names_are_imported_when_they_are_first_used(zoo):
    lines = zoo("""
        import zoo
        print(sorted(set(dir(zoo)) & {"VOLUME", "cats", "sing", "__all__"}))
        print(zoo.VOLUME, zoo.sing())
        from zoo import cats
        print(cats.__name__)
        try: zoo.dogs
        except AttributeError as error: print(error)
        from zoo import *
        print(VOLUME)
    """)
    assert lines == [
        "['VOLUME', '__all__', 'cats', 'sing']",
        "song imported",
        "11 la",
        "cats imported",
        "zoo.cats",
        "module 'zoo' has no attribute 'dogs'",
        "11",
    ]
