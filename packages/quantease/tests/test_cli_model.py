import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from quantease import choices
from quantease.cli import main
from quantease.export import save
from quantease.model.matrices import find_matrices


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """A tiny Llama with a tokenizer of single characters, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_llama.save_pretrained(path)
    vocabulary = {chr(32 + i): i for i in range(95)} | {"[UNK]": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    (path / "text.txt").write_text("\n\n".join(f"line {i} of a text that says little" for i in range(200)))
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_quantize_inspect_eval_export(folder, tmp_path):
    common = ("--text", folder / "text.txt", "--json")
    arguments = ("quantize", folder, tmp_path / "out", "--bits", 3, "--windows", 6, "--length", 32, *common)
    report = json.loads(run(*arguments).stdout)
    assert report["layers"] == 21
    assert report["certified_layers"] == 21
    assert report["quantized_fraction"] == 1.0
    assert report["kl"] > 0
    assert report["evaluation_tokens"] == 4 * 32
    assert report["left_alone"] == []
    assert report["export"]["logit_difference"] == 0.0
    assert 3 < report["bits_per_weight"] < 4
    assert json.loads(run(*arguments).stdout)["export"] == report["export"]  # a finished run is not done again
    assert (tmp_path / "out" / "quantease" / "report.png").stat().st_size > 10_000
    assert "1.mlp.down_proj" in (tmp_path / "out" / "quantease" / "report.md").read_text()
    assert "mlp.down_proj" in run("inspect", tmp_path / "out").stdout
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["summary"]["layers"] == 21
    exported = run("export", tmp_path / "out", tmp_path / "dense", "--model", folder, "--format", "dense", "--json")
    assert json.loads(exported.stdout)["logit_difference"] == 0.0
    measured = [
        json.loads(run("eval", tmp_path / place, "--length", 32, "--tokens", 640, *common).stdout)
        for place in ("out", "dense")
    ]
    assert measured[0]["perplexity"] == pytest.approx(measured[1]["perplexity"], rel=1e-6)


def test_compare_resumes(folder, tmp_path):
    arguments = ("compare", folder, tmp_path, "--windows", 6, "--evaluation", 4, "--length", 32, "--blocks", 1)
    arguments += ("--bits", 2, "--outliers", 0.02, "--text", folder / "text.txt", "--json")
    first = json.loads(run(*arguments).stdout)
    names = ["fp32", "rtn", "gptq", "gptq-clip", "quantease-paper", "quantease"]
    assert [row["method"] for row in first["rows"]] == [*names, "quantease-paper+outliers", "quantease+outliers"]
    error = {row["method"]: row["layer error (calibration)"] for row in first["rows"]}
    assert error["quantease+outliers"] < error["quantease"] < error["rtn"]
    (tmp_path / "gptq" / "result.json").unlink()
    assert json.loads(run(*arguments).stdout) == first
    assert (tmp_path / "layer_errors.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "nowhere", "out"), "expected a folder, a .gguf file or a hub id (owner/name), got nowhere"),
        (("quantize", "nowhere", "out", "--format", "zip"), "Invalid value for '--format': 'zip' is not one of"),
        (("quantize", "nowhere", "out", "--bits", "9"), "9.0 is not in the range"),
        (("inspect", "."), "RUN: expected the OUT of `quantease quantize`, found no report.json in ."),
        (("export", ".", "out", "--model", "nowhere"), "found no run.json in ."),
        (("eval", "nowhere"), "expected a folder, a .gguf file or a hub id (owner/name), got nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_too_short(folder, tmp_path):
    result = run("quantize", folder, tmp_path / "out", "--text", folder / "text.txt", "--windows", 999, code=2)
    assert "text: expected at least" in result.stderr
    assert not (tmp_path / "out").exists()


def test_formats_of_the_command_are_those_of_the_library():
    assert set(choices.FORMATS) == {*save.FORMATS, save.GGUF}


@pytest.mark.slow
def test_quantize_on_own_samples_and_evaluate_in_another_process(folder, tmp_path):
    sizes = ("--windows", 4, "--length", 24, "--text", "self", "--algorithm", "quantease-paper", "--bits", 4)
    report = json.loads(run("quantize", folder, tmp_path / "out", *sizes, "--outliers", 0.05, "--json").stdout)
    assert report["export"]["format"] == "native"
    command = ["eval", tmp_path / "out", "--text", folder / "text.txt", "--length", 32, "--tokens", 320, "--json"]
    found = subprocess.run([sys.executable, "-m", "quantease", *map(str, command)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""  # neither bars nor notes where nobody sits at a terminal
    assert 20 < json.loads(found.stdout)["perplexity"] < 200


def test_format_that_cannot_hold_the_model_is_refused_before_any_work(folder, tmp_path):
    arguments = ("quantize", folder, tmp_path / "out", "--outliers", 0.01, "--format", "compressed-tensors")
    result = run(*arguments, "--text", folder / "text.txt", code=2)
    assert "compressed-tensors has no outliers; use native or dense" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_ends_in_the_files_of_one_process(folder, tmp_path):
    """Targets, tuning block by block and end to end, the head: all of it, bit for bit."""
    sizes = ["--windows", "4", "--length", "32", "--text", str(folder / "text.txt"), "--tune", "model", "--lm-head"]
    sizes += ["--threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    both = subprocess.run(
        [*launch, "quantease", "quantize", str(folder), str(tmp_path / "two"), *sizes, "--json"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    alone = json.loads(run("quantize", folder, tmp_path / "one", *sizes, "--json").stdout)
    together = json.loads(both.stdout)
    assert together["calibration_kl_after_tuning"] == alone["calibration_kl_after_tuning"]
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.safetensors")} for f in
                (tmp_path / "one", tmp_path / "two"))  # fmt: skip
    assert one.keys() == two.keys()
    assert [str(name) for name in one if one[name] != two[name]] == []


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_model_is_never_written_over(folder, tmp_path):
    """`quantize MODEL MODEL` and its like are refused before any work, and nothing changes."""
    before, (common, quick) = weights(folder), (("--text", folder / "text.txt"), ("--windows", 2, "--length", 16))
    link = tmp_path / "link"
    link.symlink_to(folder)
    for place in (folder, link, folder / ".." / folder.name):
        result = run("quantize", folder, place, *common, *quick, code=2)
        assert "holds a model that quantease did not save" in result.stderr
    rtn = ("--algorithm", "rtn", "--format", "dense", "--evaluation", 0)
    run("quantize", folder, tmp_path / "out", *common, *quick, *rtn)
    result = run("export", tmp_path / "out", folder, "--model", folder, "--format", "dense", code=2)
    assert "holds a model that quantease did not save" in result.stderr
    assert weights(folder) == before
    # what quantease saved may be saved anew, but not over itself as the source
    result = run("quantize", tmp_path / "out", tmp_path / "out", *common, *quick, *rtn, code=2)
    assert "holds the model that is read" in result.stderr
    run("export", tmp_path / "out", tmp_path / "out", "--model", folder, "--format", "compressed-tensors")


def test_what_would_fail_at_the_end_fails_first(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such reader")

    monkeypatch.setitem(save.FORMATS, "dense", replace(save.FORMATS["dense"], load=broken))
    arguments = ("quantize", folder, tmp_path / "out", "--text", folder / "text.txt", "--windows", 2, "--length", 16)
    result = run(*arguments, "--format", "dense", code=2)
    assert "cannot be saved as dense and loaded again (no such reader)" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_most_weights_left_alone_needs_a_word(folder, tmp_path, monkeypatch):
    from quantease.model import plan

    monkeypatch.setattr(plan, "find_matrices", lambda block, skip: find_matrices(block, skip)[:1])
    arguments = ("quantize", folder, tmp_path / "out", "--text", folder / "text.txt", "--windows", 2, "--length", 16)
    result = run(*arguments, code=2)
    assert "% of the block weights would be quantized" in result.stderr
    assert not (tmp_path / "out").exists()


def test_skip_says_what_stays(folder, tmp_path):
    arguments = ("quantize", folder, tmp_path / "out", "--text", folder / "text.txt", "--windows", 2, "--length", 16)
    report = json.loads(run(*arguments, "--algorithm", "rtn", "--skip", "mlp", "--json").stdout)
    assert report["layers"] == 12
    assert report["quantized_fraction"] < 0.5
    assert report["left_alone"] == [f"model.layers.*.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    result = run(*arguments, "--skip", "(", "--overwrite", code=2)
    assert "skip: expected regular expressions, got '('" in result.stderr


@pytest.mark.parametrize(
    ("file", "content"),
    [("report.json", "{"), ("report.json", "[1]"), ("report.json", '{"summary": {}, "layers": [3]}')],
)
def test_broken_reports_are_named(file, content, tmp_path):
    (tmp_path / file).write_text(content)
    result = run("inspect", tmp_path, code=2)
    assert f"{tmp_path / file}: expected" in result.stderr


def test_two_runs_in_one_folder_end_in_one_line(folder, tmp_path):
    from core_tensor.app.runs import RunFolder

    arguments = ("quantize", folder, tmp_path / "out", "--text", folder / "text.txt", "--windows", 2, "--length", 16)
    rtn = ("--algorithm", "rtn", "--evaluation", 0)
    run(*arguments, *rtn)
    inputs = json.loads((tmp_path / "out" / "quantease" / "run.json").read_text())["inputs"]
    inputs.pop("version")
    with RunFolder.claim(tmp_path / "out" / "quantease", "quantease quantize", inputs):
        result = run(*arguments, *rtn, code=2)
    assert "another process is writing here" in result.stderr
    result = run(*arguments, "--algorithm", "gptq", code=2)
    assert "holds a run with other inputs" in result.stderr
    run(*arguments, "--algorithm", "gptq", "--evaluation", 0, "--overwrite")


def test_divergence_of_a_saved_model(folder, tmp_path):
    quick = ("--text", folder / "text.txt", "--windows", 2, "--length", 16, "--algorithm", "rtn", "--bits", 2.5)
    report = json.loads(run("quantize", folder, tmp_path / "out", *quick, "--evaluation", 0, "--json").stdout)
    assert 2.4 < report["bits_per_weight"] - 19 / 40 < 2.7  # scales and zero points of rows of 32 and 48 weights aside
    assert report["export"]["format"] == "native"
    common = ("--text", folder / "text.txt", "--length", 32, "--tokens", 320, "--against", folder, "--json")
    same, other = (json.loads(run("eval", place, *common).stdout) for place in (folder, tmp_path / "out"))
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert other["kl"] > 4 * other["kl_standard_error"] > 0
