"""CLIP and DINOv2 from files of every layout, against a plain forward and against transformers."""

import json

import pytest
import torch
from core_tensor.dev.testing import assert_close
from frechet_gan import cmmd, load_encoder
from frechet_gan.encoders.clip_dinov2 import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from torch.nn import functional as F

WIDTH, DEPTH = 128, 2


def _random(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * (0.3 if len(s) < 2 else s[-1] ** -0.5) for n, s in shapes.items()}


def _block(i, scaled, gated):
    shapes = {
        **{f"blocks.{i}.norm{k}.{part}": (WIDTH,) for k in "12" for part in ("weight", "bias")},
        f"blocks.{i}.attn.qkv.weight": (3 * WIDTH, WIDTH),
        f"blocks.{i}.attn.qkv.bias": (3 * WIDTH,),
        f"blocks.{i}.attn.proj.weight": (WIDTH, WIDTH),
        f"blocks.{i}.attn.proj.bias": (WIDTH,),
        f"blocks.{i}.mlp.fc1.weight": (512 if gated else 256, WIDTH),
        f"blocks.{i}.mlp.fc1.bias": (512 if gated else 256,),
        f"blocks.{i}.mlp.fc2.weight": (WIDTH, 256),
        f"blocks.{i}.mlp.fc2.bias": (WIDTH,),
    }
    return shapes | ({f"blocks.{i}.ls{k}.gamma": (WIDTH,) for k in "12"} if scaled else {})


def _weights(kind, *, patch=8, grid=4, registers=0, gated=False):
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        shapes |= _block(i, kind == "dinov2", gated)
    if kind == "clip":
        shapes |= {"norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,), "head.weight": (96, WIDTH)}
    else:
        shapes["patch_embed.proj.bias"] = (WIDTH,)
        if registers:
            shapes["reg_token"] = (1, registers, WIDTH)
    return _random(**shapes)


def _plain(w, x, act, eps, positions=None):
    """The network as a formula, of normalized images, by timm's names."""

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        unit = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    patch = w["patch_embed.proj.weight"].shape[-1]
    patches = F.unfold(x, patch, stride=patch).mT @ w["patch_embed.proj.weight"].flatten(1).T
    patches = patches + w.get("patch_embed.proj.bias", torch.zeros(()))
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), patches], 1)
    x = x + (w["pos_embed"] if positions is None else positions)
    if "reg_token" in w:
        x = torch.cat([x[:, :1], w["reg_token"].expand(len(x), -1, -1), x[:, 1:]], 1)
    x = norm(x, "norm_pre") if "norm_pre.weight" in w else x
    for i in range(DEPTH):
        b = f"blocks.{i}"
        q, k, v = (norm(x, f"{b}.norm1") @ w[f"{b}.attn.qkv.weight"].T + w[f"{b}.attn.qkv.bias"]).split(WIDTH, -1)
        heads = []
        for h in range(WIDTH // 64):
            own = slice(64 * h, 64 * h + 64)
            scores = (q[..., own] @ k[..., own].mT / 8).softmax(-1)
            heads.append(scores @ v[..., own])
        mixed = torch.cat(heads, -1) @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"]
        x = x + mixed * w.get(f"{b}.ls1.gamma", torch.ones(()))
        inner = act(norm(x, f"{b}.norm2") @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"])
        mixed = inner @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"]
        x = x + mixed * w.get(f"{b}.ls2.gamma", torch.ones(()))
    x = norm(x, "norm")[:, 0]
    return x @ w["head.weight"].T if "head.weight" in w else x


def _quick(x):
    return x / (1 + (-1.702 * x).exp())


def _erf(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _gated(x):
    gate, value = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * value


def _as_openai(w, prefix="visual."):
    """The layout of OpenAI's and open_clip's state dictionaries, with a piece of the text half."""
    names = (
        *(("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj", "conv1")),
        *(("norm_pre", "ln_pre"), ("head.weight", "proj"), (".norm1", ".ln_1"), (".norm2", ".ln_2")),
        *(("blocks", "transformer.resblocks"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj")),
        *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
    )
    found = {}
    for name, value in w.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        name = "ln_post" + name[4:] if name.startswith("norm.") else name
        value = value.flatten() if name == "class_embedding" else value
        value = value[0] if name == "positional_embedding" else value
        found[prefix + name] = value.T if name == "proj" else value
    return found | ({"token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())} if prefix else {})


def _images(size):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _normalized(images, mean, std):
    return ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("layout", ["openai", "visual", "timm", "ddp"])
@pytest.mark.parametrize(("kind", "act"), [("clip", _quick), ("openclip", _erf)])
def test_clip_of_every_layout_equals_a_plain_forward(tmp_path, layout, kind, act):
    w = _weights("clip")
    saved = {
        "openai": _as_openai(w),
        "visual": _as_openai(w, ""),
        "timm": w,
        "ddp": {"epoch": torch.zeros(()), "state_dict": {f"module.{n}": v for n, v in _as_openai(w).items()}},
    }[layout]
    torch.save(saved, tmp_path / "w.pt")
    encoder = load_encoder(f"{kind}:{tmp_path / 'w.pt'}")
    assert encoder.size == 32
    images = _images(32)
    truth = _plain(w, _normalized(images, CLIP_MEAN, CLIP_STD), act, 1e-5)
    assert_close("features", truth, encoder(images), 1e-5)
    wrong = _plain(w, _normalized(images, CLIP_MEAN, CLIP_STD), _quick if act is _erf else _erf, 1e-5)
    assert float((wrong - truth).norm() / truth.norm()) > 1e-3  # so that the test can tell them apart


@pytest.mark.parametrize(("registers", "gated"), [(0, False), (3, False), (0, True)])
@pytest.mark.parametrize("layout", ["hub", "timm"])
def test_dinov2_equals_a_plain_forward(tmp_path, registers, gated, layout):
    w = _weights("dinov2", registers=registers, gated=gated)
    saved = dict(w)
    if layout == "hub":
        saved["mask_token"] = torch.zeros(1, WIDTH)
        saved = {n.replace("fc1", "w12").replace("fc2", "w3") if gated else n: v for n, v in saved.items()}
        if registers:
            saved["register_tokens"] = saved.pop("reg_token")
    elif registers:  # timm adds the position of the class token to the token
        saved["cls_token"], saved["pos_embed"] = w["cls_token"] + w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
    torch.save(saved, tmp_path / "w.pth")
    encoder = load_encoder(f"dinov2:{tmp_path / 'w.pth'}")
    images = _images(32)
    truth = _plain(w, _normalized(images, IMAGENET_MEAN, IMAGENET_STD), _gated if gated else _erf, 1e-6)
    assert_close("features", truth, encoder(images), 1e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_positions_of_another_size(tmp_path, registers):
    w = _weights("dinov2", patch=14, grid=20, registers=registers)
    torch.save(w, tmp_path / "w.pth")
    encoder = load_encoder(f"dinov2:{tmp_path / 'w.pth'}")
    assert encoder.size == 224  # of 280
    stored = w["pos_embed"][:, 1:].reshape(1, 20, 20, WIDTH).permute(0, 3, 1, 2)
    if registers:
        moved = F.interpolate(stored, size=(16, 16), mode="bicubic", antialias=True)
    else:
        moved = F.interpolate(stored, scale_factor=(16.1 / 20, 16.1 / 20), mode="bicubic")
    positions = torch.cat([w["pos_embed"][:, :1], moved.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)], 1)
    images = _images(224)
    truth = _plain(w, _normalized(images, IMAGENET_MEAN, IMAGENET_STD), _erf, 1e-6, positions)
    assert_close("features", truth, encoder(images), 1e-5)


def _saved(network, folder):
    """A network with weights away from their initial zeros and ones, and its file as it is published."""
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn(value.shape) * 0.05)
    network.eval().save_pretrained(folder)
    return folder / "model.safetensors"


def test_files_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    sizes |= {"image_size": 32, "patch_size": 8}
    images = _images(32)
    vision = transformers.CLIPVisionConfig(**sizes, intermediate_size=256, projection_dim=96)
    network = transformers.CLIPVisionModelWithProjection(vision)
    file = _saved(network, tmp_path / "clip")
    with torch.no_grad():
        truth = network(_normalized(images, CLIP_MEAN, CLIP_STD)).image_embeds
    assert_close("CLIP", truth, load_encoder(f"clip:{file}")(images), 1e-5)
    for name, more in (("Dinov2", {}), ("Dinov2", {"use_swiglu_ffn": True}), ("Dinov2WithRegisters", {})):
        config = getattr(transformers, f"{name}Config")(**sizes, mlp_ratio=2, **more)
        network = getattr(transformers, f"{name}Model")(config)
        file = _saved(network, tmp_path / f"{name}{len(more)}")
        with torch.no_grad():
            truth = network(_normalized(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]
        assert_close(f"{name} {more}", truth, load_encoder(f"dinov2:{file}")(images), 1e-5)


def test_cmmd_of_clip_is_the_published_formula(tmp_path):
    torch.save(_as_openai(_weights("clip")), tmp_path / "w.pt")
    encoder = load_encoder(f"clip:{tmp_path / 'w.pt'}")
    generator = torch.Generator().manual_seed(0)
    sides = [encoder(torch.rand(n, 3, 32, 32, generator=generator) ** p * 2 - 1) for n, p in ((40, 1), (30, 3))]
    x, y = (s.double() / s.double().norm(dim=1, keepdim=True) for s in sides)

    def mean_kernel(a, b):  # sigma = 10, scale = 1000, diagonals included
        return torch.stack([(-(r - b).square().sum(1) / 200).exp() for r in a]).mean()

    truth = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(*sides) == pytest.approx(float(truth), rel=1e-5)
    assert cmmd(*sides) > 0.1


def test_other_files_are_refused(tmp_path):
    good, dino = _as_openai(_weights("clip")), _weights("dinov2")
    cases = {
        "dino": (dino, "clip", "no norm before its blocks or no projection"),
        "clip": (_weights("clip"), "dinov2", "no scales of its branches"),
        "resnet": ({"visual.conv1.weight": torch.zeros(8, 3, 3, 3)}, "clip", "no patch_embed.proj.weight among"),
        "mae": ({n: v for n, v in dino.items() if "ls" not in n}, "dinov2", "no scales of its branches"),
        "missing": ({n: v for n, v in dino.items() if n != "blocks.1.norm2.bias"}, "dinov2", "no blocks.1.norm2.bias"),
        "more": (dino | {"head.0.bias": torch.zeros(3)}, "dinov2", "unknown head.0.bias"),
        "mixed": (good | {"visual.proj": torch.zeros(7, 96)}, "clip", r"head.weight .*\(96, 128\), got \(96, 7\)"),
        "positions": (dino | {"pos_embed": torch.zeros(1, 16, WIDTH)}, "dinov2", "16 positions of width 128"),
        "narrow": (good | {"visual.conv1.weight": torch.zeros(100, 3, 8, 8)}, "clip", "no whole number of attention"),
        "nan": (dino | {"norm.bias": torch.full((WIDTH,), torch.nan)}, "dinov2", "NaN or infinity in norm.bias"),
        "list": ([1.0], "clip", "state dictionary"),
    }  # fmt: skip
    for name, (state, kind, message) in cases.items():
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"{name}.pt: expected .*{message}"):
            load_encoder(f"{kind}:{tmp_path / name}.pt")
    whole = (tmp_path / "dino.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.pt: expected a state dictionary"):
        load_encoder(f"dinov2:{tmp_path / 'cut.pt'}")
    with pytest.raises(ValueError, match=r"encoder: expected DINOv2's ViT-L/14 as .*dinov2_vitl14_pretrain.pth"):
        load_encoder("dinov2")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"TorchScript archives run code; if you trust it: torch.save\(torch.jit.load"):
        load_encoder(f"clip:{tmp_path / 'script.pt'}")


def test_a_configuration_beside_the_file_is_believed(tmp_path):
    torch.save(_as_openai(_weights("clip")), tmp_path / "w.pt")
    for name, content in (
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {}}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"w.pt: expected openclip:FILE, because {name} beside it"):
            load_encoder(f"clip:{tmp_path / 'w.pt'}")
        load_encoder(f"openclip:{tmp_path / 'w.pt'}")
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name}"):
            load_encoder(f"openclip:{tmp_path / 'w.pt'}")
        (tmp_path / name).unlink()
