"""GTFormer and SAT against formulas written out here, on the official names of the released checkpoints."""

import argparse
import functools
import math
import zipfile

import pytest
import torch
import torch.nn.functional as F

from pro2sam_fast.errors import CheckpointError, ConfigError
from pro2sam_fast.models.gated_attention import gated_attention, gated_attention_reference, query_maps
from pro2sam_fast.models.gtformer import ARCHS, GTFormer, GTFormerConfig, PooledHead, build_gtformer, load_official

HEADS = {192: 3, 384: 6, 768: 12}
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def official_state(dim=192, classes=7, layout="pro2sam", depth=12):
    """A random state dict with the names and shapes of the released code, scaled so that nothing saturates."""
    return dict(_official_state(dim, classes, layout, depth))


@functools.cache
def _official_state(dim, classes, layout, depth):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, std=None):
        return torch.randn(shape, generator=generator) * (std or 1.0 / math.sqrt(max(1, math.prod(shape[1:]))))

    state = {"cls_token": rand(1, 1, dim, std=0.5), "pos_embed": rand(1, 197, dim, std=0.5)}
    state |= {"patch_embed.proj.weight": rand(dim, 3, 16, 16), "patch_embed.proj.bias": rand(dim, std=0.1)}
    if layout == "pro2sam":
        state["glo_embed"] = rand(1, 4, dim, std=0.5)
        for i in range(4):
            state[f"patch_merging.proj{i}.weight"] = rand(dim, 3, 16, 16)
            state[f"patch_merging.proj{i}.bias"] = rand(dim, std=0.1)
    else:
        state |= {"loc_token": rand(1, 1, dim, std=0.5), "loc_embed": rand(1, 1, dim, std=0.5)}
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            state[f"blocks.{i}.{norm}.weight"] = 1 + rand(dim, std=0.1)
            state[f"blocks.{i}.{norm}.bias"] = rand(dim, std=0.1)
        for layer, shape in shapes.items():
            state[f"blocks.{i}.{layer}.weight"] = rand(*shape)
            state[f"blocks.{i}.{layer}.bias"] = rand(shape[0], std=0.1)
    state |= {"norm.weight": 1 + rand(dim, std=0.1), "norm.bias": rand(dim, std=0.1)}
    state |= {"head.weight": rand(classes, dim, 3, 3), "head.bias": rand(classes, std=0.1)}
    state["weight"] = rand(1, 1, 3, 3)
    return state


def naive_forward(state, image, gated=(9, 10, 11)):
    """The method written out in float64 on official names: explicit resize, softmax, gate and convolution."""
    w = {key: value.double() for key, value in state.items()}
    x = image.double()
    dim = w["cls_token"].shape[-1]
    heads = HEADS[dim]
    d = dim // heads
    batch = x.shape[0]
    patches = (
        F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    )
    if "glo_embed" in w:
        small = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
        tokens = []
        for g, (dy, dx) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            proj = "patch_merging.proj0" if g == 0 else "patch_merging.proj1"
            tokens.append(F.conv2d(small[:, :, dy::2, dx::2], w[proj + ".weight"], w[proj + ".bias"]).flatten(1))
        queries, query_pos = torch.stack(tokens, 1), w["glo_embed"]
    else:
        queries, query_pos = w["loc_token"].expand(batch, -1, -1), w["loc_embed"]
    n_query = queries.shape[1]
    z = torch.cat([w["cls_token"].expand(batch, -1, -1), patches, queries], 1)
    z = z + torch.cat([w["pos_embed"], query_pos], 1)
    n = z.shape[1]
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))
    layers = []
    for i in range(depth):
        p = f"blocks.{i}."
        y = F.layer_norm(z, (dim,), w[p + "norm1.weight"], w[p + "norm1.bias"], 1e-6)
        qkv = y @ w[p + "attn.qkv.weight"].T + w[p + "attn.qkv.bias"]
        outs, logits = [], []
        for h in range(heads):
            q, k, v = (qkv[:, :, j * dim + h * d : j * dim + (h + 1) * d] for j in range(3))
            logits.append(q @ k.transpose(1, 2) / d**0.5)
        mean_logits = sum(logits) / heads
        mu = [torch.sigmoid(mean_logits[:, n - n_query + g]) for g in range(n_query)]
        m = sum(mu) / n_query
        for h in range(heads):
            v = qkv[:, :, 2 * dim + h * d : 2 * dim + (h + 1) * d]
            e = torch.exp(logits[h] - logits[h].amax(-1, keepdim=True))
            a = e / e.sum(-1, keepdim=True)
            outs.append((a * m[:, None, :] if i in gated else a) @ v)
        if i in gated:
            layers.append(torch.stack(mu, 1)[:, :, 1 : n - n_query])
        z = z + torch.cat(outs, -1) @ w[p + "attn.proj.weight"].T + w[p + "attn.proj.bias"]
        y = F.layer_norm(z, (dim,), w[p + "norm2.weight"], w[p + "norm2.bias"], 1e-6)
        y = y @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        z = z + y @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
    z = F.layer_norm(z, (dim,), w["norm.weight"], w["norm.bias"], 1e-6)
    grid = z[:, 1 : n - n_query].transpose(1, 2).reshape(batch, dim, 14, 14)
    class_maps = F.conv2d(grid, w["head.weight"], w["head.bias"], padding=1)
    maps = (sum(layers) / len(layers)).reshape(batch, n_query, 14, 14)
    return {"logits": class_maps.mean((2, 3)), "maps": maps, "map": maps.mean(1), "class_maps": class_maps}


def wrap(state):
    return {"model": {f"module.{key}": value for key, value in state.items()}, "best_thr": 0.4, "epoch": 29}


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))


class TestGlobalEmbedding:
    def test_resize_to_32_is_pixel_picking(self, image):
        assert torch.equal(F.interpolate(image, size=(32, 32), mode="bilinear"), image[:, :, 3::7, 3::7])

    @pytest.mark.parametrize("tokens", [1, 4, 9, 16])
    def test_tokens_are_convolutions_of_the_phases(self, image, tokens):
        r = math.isqrt(tokens)
        embed = GTFormer(num_query_tokens=tokens, **SMALL).query_embed
        small = F.interpolate(image, size=(16 * r, 16 * r), mode="bilinear", align_corners=False)
        out = embed(image)
        for g in range(tokens):
            dx, dy = divmod(g, r)
            kernel = embed.weight[g].view(-1, 3, 16, 16)
            expected = F.conv2d(small[:, :, dy::r, dx::r], kernel, embed.bias[g]).flatten(1)
            torch.testing.assert_close(out[:, g], expected, rtol=1e-5, atol=1e-5)

    def test_strided_gather_equals_resize_bit_for_bit(self, image):
        embed = GTFormer(**SMALL).query_embed
        small = F.interpolate(image, size=(32, 32), mode="bilinear", align_corners=False)
        phases = torch.stack([small[:, :, dy::2, dx::2].flatten(1) for dx in (0, 1) for dy in (0, 1)], 1)
        assert torch.equal(embed.phases(image), phases)

    def test_area_downsample_averages_cells(self, image):
        embed = GTFormer(global_downsample="area", **SMALL).query_embed
        assert torch.allclose(embed.phases(image)[:, 0, 0], image[:, 0, :7, :7].mean((1, 2)), atol=1e-6)


class TestGatedAttention:
    @pytest.mark.parametrize("queries", [1, 4])
    @pytest.mark.parametrize("tokens", [198, 201, 37])
    def test_equals_reference_with_gradients_in_float64(self, queries, tokens):
        torch.manual_seed(tokens + queries)
        leaves = [torch.randn(2, tokens, 48, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        grad_out = torch.randn(2, tokens, 48, dtype=torch.float64)
        grad_maps = torch.randn(2, queries, tokens, dtype=torch.float64)
        results = []
        for function in (gated_attention, gated_attention_reference):
            out, maps = function(*leaves, 3, queries)
            grads = torch.autograd.grad((out * grad_out).sum() + (maps * grad_maps).sum(), leaves)
            results.append((out, maps, *grads))
        for fast, plain, tolerance in zip(*results, [1e-12, 1e-12, 1e-10, 1e-10, 1e-10], strict=True):
            assert (fast - plain).abs().max() <= tolerance

    def test_gradients_equal_the_closed_form(self):
        """Equations of the gradient of a gated layer: dV scaled by the gate, rank-G updates of q and k."""
        torch.manual_seed(0)
        tokens, dim, heads, queries = 21, 12, 3, 4
        q, k, v = (torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True) for _ in range(3))
        grad_out, grad_maps = torch.randn(tokens, dim).double(), torch.randn(queries, tokens).double()
        out, maps = gated_attention(q[None], k[None], v[None], heads, queries)
        got = torch.autograd.grad((out[0] * grad_out).sum() + (maps[0] * grad_maps).sum(), (q, k, v))
        with torch.no_grad():
            d, scale = dim // heads, (dim // heads) ** -0.5
            mu = torch.sigmoid(q[-queries:] @ k.T * scale / heads)
            m = mu.mean(0)
            dq, dk, dv_gated = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for h in range(heads):
                s = slice(h * d, (h + 1) * d)
                a = (q[:, s] @ k[:, s].T * scale).softmax(-1)
                dv_gated[:, s] = a.T @ grad_out[:, s]
                dp = grad_out[:, s] @ (m[:, None] * v[:, s]).T
                ds = a * (dp - (grad_out[:, s] * out[0][:, s]).sum(-1, keepdim=True))
                dq[:, s], dk[:, s] = scale * ds @ k[:, s], scale * ds.T @ q[:, s]
            dmu = (dv_gated * v).sum(-1) / queries + grad_maps
            dz = dmu * mu * (1 - mu)
            dk += scale / heads * dz.T @ q[-queries:]
            dq[-queries:] += scale / heads * dz @ k
            expected = (dq, dk, m[:, None] * dv_gated)
        for one, other in zip(got, expected, strict=True):
            assert (one - other).abs().max() <= 1e-12

    def test_fp32_close_to_float64(self):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 201, 384) for _ in range(3))
        out, maps = gated_attention(q, k, v, 6, 4)
        exact, exact_maps = gated_attention_reference(q.double(), k.double(), v.double(), 6, 4)
        assert (out - exact).norm() <= 1e-5 * exact.norm()
        assert (maps - exact_maps).norm() <= 1e-5 * exact_maps.norm()

    def test_output_rows(self):
        q, k, v = (torch.randn(1, 20, 12, dtype=torch.float64) for _ in range(3))
        rows, _ = gated_attention(q, k, v, 3, 4, query_rows=slice(1, -4))
        assert torch.allclose(rows, gated_attention(q, k, v, 3, 4)[0][:, 1:-4], atol=1e-13)

    def test_gate_off_is_plain_attention(self):
        q, k, v = (torch.randn(1, 20, 12, dtype=torch.float64) for _ in range(3))
        out, maps = gated_attention(q, k, v, 1, 4, gate=False)
        assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-13)
        assert torch.equal(maps, gated_attention(q, k, v, 1, 4)[1])

    def test_maps_are_float32_from_bfloat16(self):
        q, k = torch.randn(1, 4, 12).bfloat16(), torch.randn(1, 20, 12).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            maps = query_maps(q, k, 3)
        assert maps.dtype == torch.float32
        assert torch.allclose(maps, query_maps(q.float(), k.float(), 3), atol=1e-6)


class TestHead:
    def test_equals_convolution_and_pooling_with_gradient(self):
        torch.manual_seed(0)
        head = PooledHead(6, 5).double()
        x = torch.randn(3, 14, 14, 6, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(3, 5, dtype=torch.float64)
        fast, plain = head(x), head.class_maps(x).mean((2, 3))
        assert (fast - plain).abs().max() <= 1e-12
        inputs = (x, head.weight, head.bias)
        pairs = zip(torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True)
        assert all((one - other).abs().max() <= 1e-12 for one, other in pairs)

    def test_a_single_pixel_in_every_corner_and_edge(self):
        head = PooledHead(1, 2).double()
        for i, j in [(0, 0), (0, 13), (13, 0), (13, 13), (0, 5), (7, 13), (6, 6)]:
            x = torch.zeros(1, 14, 14, 1, dtype=torch.float64)
            x[0, i, j] = 1
            assert (head(x) - head.class_maps(x).mean((2, 3))).abs().max() <= 1e-15


class TestModel:
    @pytest.mark.parametrize(
        ("options", "count"),
        [
            ({}, 26_305_384),
            ({"num_classes": 200}, 23_539_784),
            ({"preset": "sat"}, 25_123_432),
            ({"preset": "sat", "num_classes": 200}, 22_357_832),
            ({"num_query_tokens": 1}, 25_418_344),
            ({"num_query_tokens": 16}, 29_853_544),
        ],
    )
    def test_parameter_counts(self, options, count):
        with torch.device("meta"):
            model = build_gtformer(**options)
        assert sum(p.numel() for p in model.parameters()) == count

    @pytest.mark.parametrize("preset", ["default", "official", "sat"])
    def test_map_only_inference_equals_forward(self, preset, image):
        torch.manual_seed(0)
        model = build_gtformer("deit_tiny", 5, preset).eval()
        with torch.inference_mode():
            assert (model.coarse_map(image) - model(image)["map"]).abs().max() <= 1e-6

    @pytest.mark.parametrize("gated", [(0,), (1, 3), (0, 1, 2)])
    def test_map_only_inference_with_other_gated_blocks(self, gated, image):
        torch.manual_seed(0)
        model = GTFormer(gated_blocks=gated, **SMALL).double().eval()
        with torch.inference_mode():
            assert (model.coarse_map(image.double()) - model(image.double())["map"]).abs().max() <= 1e-12

    def test_permuting_query_tokens_permutes_the_maps_only(self, image):
        torch.manual_seed(0)
        model = GTFormer(num_classes=5, **SMALL).double().eval()
        order = [2, 0, 3, 1]
        with torch.no_grad():
            before = model(image.double())
            patches, queries = model.embed(image.double())
            model.query_pos.copy_(model.query_pos[:, order])
            after = model.forward_tokens(patches, queries[:, order])
        for key in ("logits", "map"):
            assert (after[key] - before[key]).abs().max() <= 1e-12
        assert (after["maps"] - before["maps"][:, order]).abs().max() <= 1e-12
        assert (after["maps"] - before["maps"]).abs().max() > 1e-6

    def test_sat_has_one_map_and_198_tokens(self, image):
        model = build_gtformer("deit_tiny", 5, "sat").eval()
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        out = model(image)
        assert seen == [198]
        assert out["maps"].shape == (2, 1, 14, 14)
        assert torch.equal(out["map"], out["maps"][:, 0])
        assert model.query_token.shape == (1, 1, 192)

    def test_outputs_do_not_depend_on_the_rest_of_the_batch(self, image):
        model = GTFormer(num_classes=5, **SMALL).double().eval()
        both, one = model(image.double()), model(image[1:].double())
        assert all((both[key][1:] - one[key]).abs().max() <= 1e-12 for key in one)

    def test_class_maps_only_on_request(self, image):
        model = GTFormer(num_classes=5, **SMALL).eval()
        assert set(model(image)) == {"logits", "maps", "map"}
        out = model(image, class_maps=True)
        assert out["class_maps"].shape == (2, 5, 14, 14)
        torch.testing.assert_close(out["class_maps"].mean((2, 3)), out["logits"], rtol=1e-4, atol=1e-6)

    def test_every_parameter_learns(self, image):
        model = GTFormer(num_classes=5, **SMALL)
        out = model(image)
        (out["logits"].square().sum() + out["maps"].sum()).backward()
        # the class token only reaches the outputs as a key, so it too has a gradient
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_gate_none_keeps_maps_but_not_the_gate(self, image):
        torch.manual_seed(0)
        gated = GTFormer(num_classes=5, **SMALL).eval()
        plain = GTFormer(num_classes=5, gate="none", **SMALL).eval()
        plain.load_state_dict(gated.state_dict())
        assert not torch.allclose(gated(image)["logits"], plain(image)["logits"], atol=1e-7)
        assert plain(image)["maps"].shape == (2, 4, 14, 14)

    def test_bfloat16_autocast_keeps_maps_in_float32(self, image):
        torch.manual_seed(0)
        model = build_gtformer("deit_tiny", 5).eval()
        with torch.inference_mode():
            exact = model(image)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(image)
                fast = model.coarse_map(image)
        assert out["map"].dtype == out["maps"].dtype == fast.dtype == torch.float32
        assert (out["map"] - exact["map"]).abs().max() < 0.02
        assert (fast - out["map"]).abs().max() < 0.005

    def test_empty_batch(self):
        model = GTFormer(num_classes=5, **SMALL).eval()
        out = model(torch.zeros(0, 3, 224, 224))
        assert out["logits"].shape == (0, 5) and out["map"].shape == (0, 14, 14)

    def test_drop_path_rates_and_scaling(self):
        model = GTFormer(drop_path=0.2, **{**SMALL, "depth": 5})
        assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
        torch.manual_seed(0)
        kept = model.blocks[4].drop(torch.ones(20000, 1, 1)).flatten()
        assert kept.unique().tolist() == pytest.approx([0.0, 1.25])
        assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
        assert torch.equal(model.eval().blocks[4].drop(torch.ones(3, 2, 2)), torch.ones(3, 2, 2))

    def test_initialisation(self):
        torch.manual_seed(0)
        model = build_gtformer("deit_small", 200)
        assert model.head.weight.abs().max().item() == pytest.approx(0.017010, abs=2e-6)
        assert model.query_embed.weight.abs().max().item() == pytest.approx(0.036084, abs=2e-6)
        assert model.query_embed.bias.abs().max() <= 1 / math.sqrt(768)
        for tensor in (model.blocks[0].attn.qkv.weight, model.pos_embed, model.blocks[3].mlp.fc2.weight):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.02)
        assert model.query_pos.std().item() == pytest.approx(0.02, rel=0.1)
        assert not model.blocks[0].mlp.fc1.bias.any() and not model.blocks[0].norm1.bias.any()

    def test_compiles_without_graph_breaks(self, image):
        model = GTFormer(num_classes=5, **{**SMALL, "depth": 3}).eval()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(image)["logits"], model(image)["logits"], atol=1e-6)

    def test_hybrid_with_another_patch_embedding(self, image):
        class Features(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 24, 16, 16)
                self.proj = torch.nn.Linear(24, 36)

            def forward(self, x):
                return self.proj(self.conv(x).flatten(2).transpose(1, 2))

        model = GTFormer(
            patch_embed=Features(), embed_dim=36, depth=2, num_heads=2, mlp_ratio=2, num_classes=11, gated_blocks=[1]
        ).eval()
        out = model(image)
        assert out["logits"].shape == (2, 11) and out["maps"].shape == (2, 4, 14, 14)
        assert (model.coarse_map(image) - out["map"]).abs().max() <= 1e-6
        model.patch_embed = torch.nn.Identity()
        with pytest.raises(ConfigError, match="patch_embed"):
            model(image)

    @pytest.mark.parametrize(
        "x",
        [
            torch.zeros(1, 3, 256, 256),
            torch.zeros(3, 224, 224),
            torch.zeros(1, 1, 224, 224),
            torch.zeros(1, 3, 224, 224, dtype=torch.uint8),
        ],
    )
    def test_other_inputs_are_errors(self, x):
        model = GTFormer(**SMALL)
        for function in (model, model.coarse_map):
            with pytest.raises(ConfigError, match="224"):
                function(x)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_query_tokens": 3},
            {"num_query_tokens": 0},
            {"num_query_tokens": 225},
            {"embed_dim": 50, "num_heads": 4},
            {"gated_blocks": (12,)},
            {"gated_blocks": ()},
            {"gated_blocks": 3},
            {"gate": "relu"},
            {"query_source": "nowhere"},
            {"drop_path": 1.0},
            {"num_classes": 0},
            {"mlp_ratio": 0},
            {"no_such_option": 1},
            {"arch": "deit_huge"},
            {"preset": "best"},
            {"pretrained": {}, "patch_embed": torch.nn.Identity()},
        ],
    )
    def test_bad_options(self, options):
        with pytest.raises(ConfigError):
            build_gtformer(**{"arch": "deit_tiny", **options})

    def test_config_defaults(self):
        config = GTFormerConfig()
        assert config.gated_blocks == (9, 10, 11)
        assert GTFormer(config, depth=2, embed_dim=12, num_heads=1).config.gated_blocks == (0, 1)
        assert build_gtformer("deit_tiny", preset="official").query_embed.weight.shape == (2, 192, 768)
        assert set(ARCHS) == {"deit_tiny", "deit_small", "deit_base"}


class TestOfficialCheckpoints:
    @pytest.mark.parametrize("layout", ["pro2sam", "sat"])
    def test_reproduces_the_naive_forward(self, layout, image, tmp_path):
        state, image = official_state(layout=layout), image[:1]
        path = tmp_path / "official.pth"
        torch.save(wrap(state), path, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(path)
        model = load_official(path)
        assert not model.training
        assert model.checkpoint_info == {"best_thr": 0.4, "epoch": 29}
        assert model.config.num_classes == 7 and model.config.num_query_tokens == (4 if layout == "pro2sam" else 1)
        expected = naive_forward(state, image)
        with torch.no_grad():
            out = model.double()(image.double(), class_maps=True)
            coarse = model.coarse_map(image.double())
        for key, value in expected.items():
            assert (out[key] - value).abs().max() <= 1e-12 * max(1, value.abs().max()), key
        assert (coarse - expected["map"]).abs().max() <= 1e-12
        assert expected["map"].std() > 0.01

    def test_shared_projection_gives_the_same_outputs(self, image):
        state = official_state()
        independent, shared = load_official(state), load_official(wrap(state), preset="official", arch="deit_tiny")
        assert shared.query_embed.weight.shape[0] == 2 and independent.query_embed.weight.shape[0] == 4
        with torch.no_grad():
            torch.testing.assert_close(independent(image), shared(image), rtol=1e-5, atol=1e-6)

    def test_small_and_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        save_file(official_state(dim=384, classes=3), tmp_path / "small.safetensors")
        assert load_official(tmp_path / "small.safetensors", arch="deit_small", num_classes=3).config.embed_dim == 384

    def test_unused_entries_may_be_absent(self):
        state = official_state()
        for key in ("weight", "patch_merging.proj2.weight", "patch_merging.proj3.bias"):
            del state[key]
        load_official(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("blocks.3.attn.qkv.bias"), "lacks blocks.3.attn.qkv.bias"),
            (lambda s: s.update(surprise=torch.zeros(1)), "unexpected entries: surprise"),
            (lambda s: s.update({"norm.bias": torch.zeros(5)}), r"norm.bias of shape \(5,\)"),
            (lambda s: s.update({"norm.bias": torch.full((192,), math.nan)}), "aren't finite"),
            (lambda s: s.update({"norm.bias": torch.zeros(192, dtype=torch.int64)}), "dense floating"),
            (lambda s: s.update({"norm.bias": torch.zeros(1).expand(192)}), "dense floating"),
            (lambda s: s.update(cls_token=torch.zeros(1, 1, 100)), "width 100"),
            (lambda s: s.update(loc_embed=torch.zeros(1, 1, 192)), "both of glo_embed"),
            (lambda s: s.pop("glo_embed"), "neither of glo_embed"),
            (lambda s: s.pop("head.weight"), "head.weight"),
            (lambda s: s.update(note="text"), "isn't a named tensor"),
        ],
    )
    def test_mismatch_is_one_sentence_with_the_file(self, change, message, tmp_path):
        state = official_state()
        change(state)
        path = tmp_path / "odd.pth"
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message) as info:
            load_official(path)
        assert str(path) in str(info.value) and "\n" not in str(info.value)

    @pytest.mark.parametrize(
        "data", [b"", b"not a checkpoint", b"\x80\x02cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04rest"]
    )
    def test_corrupt_and_hostile_files(self, data, tmp_path):
        path = tmp_path / "bad.pth"
        path.write_bytes(data)
        for load in (load_official, lambda p: build_gtformer("deit_tiny", pretrained=p)):
            with pytest.raises(CheckpointError) as info:
                load(path)
            assert str(path) in str(info.value) and "\n" not in str(info.value)

    def test_truncated_file(self, tmp_path):
        path = tmp_path / "cut.pth"
        torch.save(wrap(official_state(depth=1)), path)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(CheckpointError):
            load_official(path)

    def test_code_in_a_file_is_not_run(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"model": {"x": Hostile()}}, tmp_path / "hostile.pth")
        with pytest.raises(CheckpointError):
            load_official(tmp_path / "hostile.pth")
        assert not (tmp_path / "ran").exists()

    def test_wrong_expectations(self, tmp_path):
        state = official_state(layout="sat")
        for options in ({"arch": "deit_small"}, {"num_classes": 8}, {"preset": "official"}):
            with pytest.raises(CheckpointError):
                load_official(state, **options)
        with pytest.raises(CheckpointError):
            load_official(official_state(), preset="sat")
        with pytest.raises(CheckpointError, match="doesn't exist"):
            load_official(tmp_path / "missing.pth")
        for options in ({"depth": 3}, {"arch": "x"}, {"preset": "x"}, {"nonsense": 1}):
            with pytest.raises(ConfigError):
                load_official(state, **options)


class TestDeit:
    @staticmethod
    def deit(dim=192):
        drop = ("glo_embed", "patch_merging", "weight", "head")
        state = {key: value for key, value in official_state(dim).items() if not key.startswith(drop)}
        return {**state, "head.weight": torch.zeros(1000, dim), "head.bias": torch.zeros(1000)}

    @pytest.mark.parametrize("preset", ["default", "sat"])
    def test_trunk_is_copied_and_the_rest_kept(self, preset, tmp_path):
        path = tmp_path / "deit.pth"
        torch.save({"model": self.deit(), "args": argparse.Namespace(lr=1e-4), "epoch": 299}, path)
        torch.manual_seed(3)
        model = build_gtformer("deit_tiny", 5, preset, pretrained=path)
        torch.manual_seed(3)
        fresh = build_gtformer("deit_tiny", 5, preset).state_dict()
        deit = self.deit()
        new = {"head.weight", "head.bias", "query_pos"}
        new |= {"query_token"} if preset == "sat" else {"query_embed.weight", "query_embed.bias"}
        state = model.state_dict()
        assert state.keys() - deit.keys() == new - {"head.weight", "head.bias"}
        assert all(torch.equal(value, fresh[key] if key in new else deit[key]) for key, value in state.items())

    def test_distilled_and_misfitting_checkpoints(self):
        state = self.deit()
        state |= {"head_dist.weight": torch.zeros(1000, 192), "dist_token": torch.zeros(1, 1, 192)}
        with pytest.raises(CheckpointError, match="dist_token"):
            build_gtformer("deit_tiny", pretrained=state)
        with pytest.raises(CheckpointError, match="shape"):
            build_gtformer("deit_small", pretrained=self.deit())

    def test_timm_names_fit(self):
        timm = pytest.importorskip("timm")
        state = timm.create_model("deit_tiny_patch16_224", pretrained=False).state_dict()
        model = build_gtformer("deit_tiny", 5, pretrained=state)
        assert torch.equal(model.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])

    def test_network_failure_is_a_checkpoint_error(self, monkeypatch):
        timm = pytest.importorskip("timm")

        def fail(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr(timm, "create_model", fail)
        with pytest.raises(CheckpointError, match="deit_tiny"):
            build_gtformer("deit_tiny", pretrained=True)
