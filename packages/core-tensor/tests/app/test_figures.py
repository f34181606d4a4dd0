import sys

import pytest
from core_tensor.app import figures
from core_tensor.app.extras import MissingExtraError


@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_every_format_is_written_and_the_same_figure_is_the_same_file(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    contents = []
    for name in ("a", "b"):
        plt = figures.pyplot("core-tensor[plot]")
        figure, axis = plt.subplots()
        axis.plot([0, 1], [1, 0], label="line")
        axis.legend()
        path = tmp_path / f"{name}{suffix}"
        figures.check(path, "core-tensor[plot]")
        figures.save(figure, path)
        contents.append(path.read_bytes())
        assert not plt.get_fignums()
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", ["picture", "picture.txt", "picture.npz"])
def test_a_name_that_is_no_picture_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(ValueError, match="expected a picture's name"):
        figures.check(tmp_path / name, "core-tensor[plot]")
    with pytest.raises(ValueError, match="expected a picture's name"):
        figures.save(None, tmp_path / name)


def test_the_extra_is_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib.*pip install 'msam\[plot\]'"):
        figures.check(tmp_path / "a.png", "msam[plot]")
