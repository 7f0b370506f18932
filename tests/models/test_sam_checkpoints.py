"""Checkpoints: local files, downloads, and everything that can be wrong with them."""

import argparse
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from pro2sam_fast.errors import CheckpointError
from pro2sam_fast.models.checkpoints import load_into, load_state_dict
from pro2sam_fast.models.sam import build
from pro2sam_fast.models.sam.build import build_sam, build_vit_sam


def tiny(**options):
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "window_size": 2, "img_size": 32, **options}
    return build_vit_sam(global_attn_indexes=(), width=32, decoder_mlp_dim=32, **options)


@pytest.fixture
def tiny_vit_b(monkeypatch):
    """`vit_b` is a tiny model here, so that files are small."""
    config = {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "window_size": 2,
        "img_size": 32,
        "global_attn_indexes": (),
        "width": 32,
        "decoder_mlp_dim": 32,
    }
    monkeypatch.setitem(build._VIT, "vit_b", config)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["pth", "pth nested", "pth legacy", "pt with options", "safetensors"])
def test_local_files(tmp_path, tiny_vit_b, kind):
    sam = tiny()
    path = tmp_path / f"weights.{kind.split()[0]}"
    state = sam.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "pth legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    loaded = build_sam("vit_b", checkpoint=path)
    assert same_weights(sam, loaded) and not loaded.training and loaded.name == "vit_b"
    assert same_weights(sam, build_sam("vit_b", checkpoint=str(path)))


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch hacked",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unusable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights at all, really")
    (tmp_path / "folder.pth").mkdir()
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "zip.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "nothing.pth")
    expected = {
        "absent.pth": "does not exist",
        "folder.pth": "is not a file",
        "empty.pth": "is corrupt",
        "text.pth": "is corrupt",
        "text.safetensors": "is corrupt",
        "half.pth": "is corrupt",
        "half.safetensors": "is corrupt",
        "pickle.pth": "could run code|loaded safely",
        "zip.pth": "could run code",
        "list.pth": "no state dict",
        "numbers.pth": "no state dict",
        "nothing.pth": "no state dict",
    }
    for name, problem in expected.items():
        with pytest.raises(CheckpointError, match=problem) as caught:
            load_state_dict(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_weights_that_do_not_fit():
    sam = tiny()
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    state = tiny().state_dict()
    state.pop("mask_decoder.iou_token.weight")
    state["extra"] = torch.zeros(1)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 7)
    with pytest.raises(CheckpointError) as caught:
        load_into(sam, state, "my.pth")
    message = str(caught.value)
    assert "my.pth does not fit the model custom" in message
    assert "1 missing (mask_decoder.iou_token.weight)" in message
    assert "1 unexpected (extra)" in message
    assert "prompt_encoder.no_mask_embed.weight (1, 7) instead of (1, 32)" in message
    assert all(torch.equal(v, before[k]) for k, v in sam.state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing \(.*, …\)"):
        load_into(sam, {}, "my.pth")


def test_half_precision_files_are_cast():
    sam, other = tiny(), tiny()
    load_into(sam, {k: v.half() for k, v in other.state_dict().items()}, "half")
    assert all(p.dtype == torch.float32 for p in sam.parameters())


def test_another_size_is_named(tmp_path):
    path = tmp_path / "sam_vit_h.pth"
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(1280, 3, 16, 16)}, path)
    with pytest.raises(CheckpointError, match=r"sam_vit_h.pth belongs to vit_h, not to vit_b; build vit_h"):
        build_sam("vit_b", checkpoint=path)


@pytest.fixture
def mirror(tmp_path, monkeypatch, tiny_vit_b):
    """The official address of `vit_b` is a local file, the hub cache an empty folder."""
    sam = tiny()
    torch.save(sam.state_dict(), tmp_path / "source.pth")
    digest = hashlib.sha256((tmp_path / "source.pth").read_bytes()).hexdigest()
    source = (tmp_path / "source.pth").rename(tmp_path / f"sam_vit_b_{digest[:6]}.pth")
    cache = tmp_path / "hub" / "checkpoints"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache.parent))
    monkeypatch.setitem(build.OFFICIAL_URLS, "vit_b", source.as_uri())
    return sam, source, cache


def test_download(mirror, capfd):
    sam, source, cache = mirror
    assert same_weights(sam, build_sam("vit_b", checkpoint="official"))
    assert [p.name for p in cache.iterdir()] == [source.name]
    assert "100%" in capfd.readouterr().err
    source.unlink()
    assert same_weights(sam, build_sam("vit_b", checkpoint="official"))


def test_download_of_something_else(mirror):
    _, source, cache = mirror
    source.write_bytes(b"a login page")
    with pytest.raises(CheckpointError, match="not the official one") as caught:
        build_sam("vit_b", checkpoint="official")
    assert source.name in str(caught.value)
    assert list(cache.iterdir()) == []


def test_download_without_a_network(mirror, monkeypatch):
    _, _, cache = mirror
    monkeypatch.setitem(build.OFFICIAL_URLS, "vit_b", "http://127.0.0.1:9/sam_vit_b_000000.pth")
    with pytest.raises(CheckpointError, match="could not be downloaded from http://127.0.0.1:9/.*; check the network"):
        build_sam("vit_b", checkpoint="official")
    assert list(cache.iterdir()) == []


def test_download_without_a_place(mirror):
    _, _, cache = mirror
    cache.parent.write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="could not be stored"):
        build_sam("vit_b", checkpoint="official")
