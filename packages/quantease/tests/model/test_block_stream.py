import pytest
import torch
from quantease.evaluation.perplexity import perplexity, streamed_perplexity
from quantease.model.block_stream import BlockStream
from quantease.model.causal_lm import open_causal_lm


def streamed_logits(lm, tokens):
    stream = BlockStream(lm, tokens)
    for index in range(len(lm.blocks)):
        with lm.loaded(index) as block:
            stream.advance(index, block)
    return torch.stack([stream.logits(w) for w in range(len(tokens))])


def test_streamed_logits_are_the_models(architecture, tokens, tmp_path):
    model = architecture
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = torch.cat([model(input_ids=w[None], use_cache=False).logits for w in tokens])
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        torch.testing.assert_close(streamed_logits(open_causal_lm(source), tokens), expected, rtol=0, atol=0)


def test_folder_is_read_lazily_and_blocks_are_released(tiny_llama, tokens, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    lm = open_causal_lm(tmp_path)
    assert lm.lazy
    with lm.loaded(1) as block:
        assert all(not p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in lm.block(0).parameters())
    streamed_logits(lm, tokens)
    assert all(p.is_meta for i in range(3) for p in lm.block(i).parameters())


def test_model_in_memory_is_left_untouched(tiny_llama, tokens):
    before = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    lm = open_causal_lm(tiny_llama)
    with lm.loaded(0) as block:
        block.self_attn.q_proj.weight.zero_()
    assert all(torch.equal(before[k], v) for k, v in tiny_llama.state_dict().items())


def test_perplexities_agree(tiny_llama, tokens):
    streamed = streamed_perplexity(open_causal_lm(tiny_llama), tokens)
    assert streamed == pytest.approx(perplexity(tiny_llama, tokens.flatten(), length=tokens.shape[1]), rel=1e-6)


def test_perplexity_by_hand(tiny_llama, tokens):
    ids = tokens.flatten()[:21]
    losses = []
    with torch.no_grad():
        for start, scored in ((0, range(1, 9)), (4, range(9, 13)), (8, range(13, 17)), (12, range(17, 21))):
            window = ids[start : start + 9]
            logs = tiny_llama(window[None]).logits[0].log_softmax(-1)
            losses += [-logs[t - start - 1, ids[t]] for t in scored if t - start < 9]
    assert perplexity(tiny_llama, ids, length=9, stride=4) == pytest.approx(torch.stack(losses).mean().exp().item())


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere/at/all", "expected a folder"), ("absent.gguf", "expected a GGUF file")],
)
def test_absent_model(place, message):
    with pytest.raises(ValueError, match=message):
        open_causal_lm(place)


def test_truncated_and_foreign_files(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"not safetensors"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file"):
            open_causal_lm(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot load"),
        ('{"model_type": "nonsense"}', "cannot load"),
        ('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 9}', "cannot load"),
    ],
)
def test_folder_without_a_model(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as found:
        open_causal_lm(tmp_path)
    assert "\n" not in str(found.value)


def test_files_that_are_no_gguf_and_devices_that_are_not_there(tiny_llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    parsers = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ValueError, match=r"cannot load .*model\.gguf"):
        open_causal_lm(tmp_path / "model.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == parsers  # what loading replaces is put back
    with pytest.raises(ValueError, match="device: expected a device that torch finds here"):
        open_causal_lm(tiny_llama, device="cuda:99")


def test_checkpoint_of_another_shape(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"vocab_size": 97', '"vocab_size": 96')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"expected shape \(96, 32\), got \(97, 32\)"):
        open_causal_lm(tmp_path)


def test_stories_model_is_the_trained_one(stories):
    sample = stories.generate(torch.ones(1, 1, dtype=torch.int64), max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        likelihood = stories(sample).logits[0, :-1].log_softmax(-1).gather(1, sample[0, 1:, None])
    assert likelihood.mean() > -1.0  # greedy text of a trained model is nearly certain; a random one has -log 512


def test_divergence_by_hand(tiny_llama, tokens, build):
    from quantease.evaluation.perplexity import Predictions, divergence, streamed, window_scores

    other = build("llama", seed=1)
    with torch.no_grad():
        p, q = (
            torch.stack([m(w[None]).logits[0].double().log_softmax(-1) for w in tokens]) for m in (tiny_llama, other)
        )
    by_window = (p.exp() * (p - q)).sum(-1).mean(-1)
    exact, found = (Predictions(streamed(open_causal_lm(m), tokens)) for m in (tiny_llama, other))
    torch.testing.assert_close(window_scores(found, exact).divergences, by_window, rtol=1e-4, atol=1e-6)
    mean, error = divergence(other, tiny_llama, tokens.flatten(), length=tokens.shape[1])
    assert mean == pytest.approx(float(by_window.mean()), rel=1e-4)
    assert error == pytest.approx(float(by_window.std() / len(tokens) ** 0.5), rel=1e-3)


def test_perplexity_with_a_first_token(tiny_llama, tokens):
    ids = tokens.flatten()[:12]
    with torch.no_grad():
        logs = [
            tiny_llama(torch.cat([torch.tensor([1]), part])[None]).logits[0].log_softmax(-1) for part in ids.split(4)
        ]
    losses = [-log[i, token] for log, part in zip(logs, ids.split(4), strict=True) for i, token in enumerate(part)]
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(tiny_llama, ids, length=5, first=1) == pytest.approx(expected, rel=1e-5)
