"""VILA's torch port against praxis layers, and its conversion against a SavedModel of the published signature."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dblightning.rewards import VILA
from dblightning.rewards.vila_convert import (
    check_agreement,
    convert_vila,
    convert_vila_main,
    match_names,
    probe_pictures,
)
from dblightning.rewards.vila_model import Layer, VilaModel, from_praxis, load_vila, praxis_names
from tests.rewards import tiny

Fixture = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(vila_fixture: Fixture) -> VilaModel:
    return from_praxis(tiny.vila_parameters(vila_fixture))


def images_of(fixture: Fixture) -> torch.Tensor:
    return torch.from_numpy(fixture["image"]).permute(0, 3, 1, 2).contiguous()


def test_scores_are_those_of_praxis(model: VilaModel, vila_fixture: Fixture) -> None:
    scores = model(images_of(vila_fixture))
    assert np.ptp(vila_fixture["score"]) > 1e-2
    np.testing.assert_allclose(scores, vila_fixture["score"][:, 0], rtol=0, atol=1e-5)  # 6e-8 measured


def test_the_gradient_is_praxis_without_the_stop_gradient(model: VilaModel, vila_fixture: Fixture) -> None:
    images = images_of(vila_fixture).requires_grad_()
    model(images).sum().backward()
    gradient, expected = images.grad.permute(0, 2, 3, 1).numpy(), vila_fixture["grad"]
    assert not vila_fixture["grad_as_published"].any()  # the published class gives guidance nothing to follow
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_attention_logits_are_capped_at_fifty() -> None:
    """The fixture's logits are small; here they reach hundreds. One head, so that the formula fits three lines."""
    torch.manual_seed(0)
    layer = Layer(width=8, heads=1, hidden=8, activation=torch.nn.functional.gelu)
    torch.nn.init.normal_(layer.qkv.weight, std=5.0)
    torch.nn.init.zeros_(layer.contract.weight)
    torch.nn.init.zeros_(layer.contract.bias)
    tokens = torch.randn(1, 5, 8)
    query, key, value = layer.qkv(layer.attention_norm(tokens))[0].detach().double().split(8, dim=-1)
    logits = query @ key.T / 8**0.5
    assert logits.abs().max() > 200
    attention = (50 * (logits / 50).tanh()).softmax(-1) @ value
    expected = tokens[0] + attention.float() @ layer.post.weight.T + layer.post.bias
    torch.testing.assert_close(layer(tokens)[0], expected, rtol=1e-4, atol=1e-4)  # float32 logits of 50: exp to 1e-5


def test_the_paper_scales_it_to_four_v_minus_two(vila_file: Path) -> None:
    images = tiny.pictures(3, 100, 80)
    bare = VILA(vila_file, scale=1.0, shift=0.0).score(images, [""] * 3)
    torch.testing.assert_close(VILA(vila_file).score(images, [""] * 3), 4 * bare - 2)
    assert VILA(vila_file).value_range == (-6.0, 2.0)


def test_a_file_written_and_read_scores_alike(model: VilaModel, vila_file: Path, vila_fixture: Fixture) -> None:
    images = images_of(vila_fixture)
    read = load_vila(vila_file)
    written = model.state_dict()
    assert set(read.state_dict()) == set(written)
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, written[name]) and weight.stride() == written[name].stride(), name
    # not bitwise: a file's weights lie in memory at the file's offsets, and sums over memory that is aligned otherwise
    # are taken in another order; a cosine of float32 vectors then moves by a few times 6e-8
    torch.testing.assert_close(read(images), model(images), rtol=0, atol=1e-6)


def test_missing_parameters_and_foreign_files_are_named(tmp_path: Path, vila_fixture: Fixture) -> None:
    parameters = tiny.vila_parameters(vila_fixture)
    del parameters["residual_ffn.bias.b"]
    with pytest.raises(ValueError, match=r"VILA's parameters lacks residual_ffn\.bias\.b"):
        from_praxis(parameters)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "vila.safetensors")
    with pytest.raises(ValueError, match=r"vila\.safetensors lacks positions"):
        VILA(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pass weights=, the path of vila\.safetensors"):
        VILA()
    with pytest.raises(ValueError, match="backend must be 'torch' or 'tensorflow', got 'jax'"):
        VILA(backend="jax")  # type: ignore[arg-type]


def test_without_tensorflow_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(FileNotFoundError, match=r"saved_model\.pb, got .*Kaggle"):
        VILA(tmp_path, backend="tensorflow")
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(ImportError, match=re.escape("pip install 'dblightning[vila]'")):
        VILA(tmp_path, backend="tensorflow")


# ── conversion ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_variables_are_matched_by_the_end_of_their_names(vila_fixture: Fixture) -> None:
    parameters = tiny.vila_parameters(vila_fixture)
    # as TensorFlow writes attributes that hold dots or slashes
    styles = {
        "dots": lambda name: f"params/mdl_vars..{name.replace('.', '..')}/.ATTRIBUTES/VARIABLE_VALUE",
        "slashes": lambda name: f"params/decoder.S{name.replace('.', '.S')}/.ATTRIBUTES/VARIABLE_VALUE",
        "nested": lambda name: f"model/{name.replace('.', '/')}/.ATTRIBUTES/VARIABLE_VALUE",
    }
    for style in styles.values():
        shapes = {style(name): array.shape for name, array in parameters.items()}
        matched = match_names({**shapes, "save_counter/.ATTRIBUTES/VARIABLE_VALUE": ()}, {})
        assert matched == {name: style(name) for name in praxis_names(parameters)}


def test_missing_and_ambiguous_variables_stop_with_a_list(vila_fixture: Fixture) -> None:
    shapes = {f"model/{name}": array.shape for name, array in tiny.vila_parameters(vila_fixture).items()}
    numbered = {f"variables/{index}": shape for index, shape in enumerate(shapes.values())}
    with pytest.raises(ValueError, match=r"No variable for: .*cls_emb(.|\n)*variables/7 \["):
        match_names(numbered, {})
    twice = {**shapes, "optimizer/cls_emb": shapes["model/cls_emb"]}
    with pytest.raises(ValueError, match="Several variables for: cls_emb: model/cls_emb, optimizer/cls_emb"):
        match_names(twice, {})
    assert match_names(twice, {"cls_emb": "model/cls_emb"})["cls_emb"] == "model/cls_emb"
    with pytest.raises(ValueError, match=r"cls_emb \(given as nothing\)"):
        match_names(shapes, {"cls_emb": "nothing"})


def test_disagreement_uniform_scores_and_nan_are_refused(model: VilaModel) -> None:
    pictures = probe_pictures(model.image_size)
    expected = [VILA(model, scale=1.0, shift=0.0).score(picture, [""]) for picture in pictures]
    assert check_agreement(model, pictures, expected) == 0
    with pytest.raises(ValueError, match=r"differ by 0\.0025, more than 0\.002 .*nothing was written"):
        check_agreement(model, pictures, [*expected[:-1], expected[-1] + 0.0025])
    with pytest.raises(ValueError, match="differ by nan"):
        check_agreement(model, pictures, [expected[0] * float("nan"), *expected[1:]])
    with pytest.raises(ValueError, match="scores all test pictures alike"):
        check_agreement(model, pictures[:1], expected[:1])


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, vila_fixture: Fixture) -> Path:
    """A SavedModel of the published signature: VILA-R in TensorFlow operations, at the fixture's sizes."""
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("vila") / "saved_model"
    _write_saved_model(folder, tiny.vila_parameters(vila_fixture))
    return folder


def test_the_converted_port_scores_as_the_saved_model(saved_model: Path, tmp_path: Path, capsys) -> None:
    convert_vila_main([str(saved_model), str(tmp_path / "vila.safetensors")])
    assert "largest difference between the backends" in capsys.readouterr().out
    torch_backend = VILA(tmp_path / "vila.safetensors")
    tensorflow_backend = VILA(saved_model, backend="tensorflow")
    assert torch_backend.differentiable and not tensorflow_backend.differentiable
    for shape in [(64, 64), (100, 37), (30, 200)]:
        images = tiny.pictures(3, *shape)
        expected = tensorflow_backend.score(images, [""] * 3)
        assert expected.std() > 1e-3
        # float32 kernels of two libraries, scaled by 4
        torch.testing.assert_close(torch_backend.score(images, [""] * 3), expected, rtol=0, atol=1e-4)
    again = pickle.loads(pickle.dumps(tensorflow_backend))
    assert torch.equal(again.score(images, [""] * 3), expected)


def test_the_converter_refuses_to_write_a_model_that_disagrees(
    saved_model: Path, tmp_path: Path, vila_fixture: Fixture
) -> None:
    out = tmp_path / "vila.safetensors"
    # one variable taken for another of the same shape: only the scores can tell
    swapped = {"unimodal_ln.bias": "parameters/residual_ffn..bias..b/.ATTRIBUTES/VARIABLE_VALUE"}
    with pytest.raises(ValueError, match="the torch port and the SavedModel differ by"):
        convert_vila(saved_model, out, names=swapped)
    assert not out.exists()
    with pytest.raises(SystemExit, match="convert-vila: VILA's SavedModel was expected"):
        convert_vila_main([str(tmp_path), str(out)])


@pytest.mark.weights
def test_the_published_saved_model_converts(tmp_path: Path) -> None:
    assert convert_vila(tiny.published("DBLIGHTNING_VILA"), tmp_path / "vila.safetensors") <= 2e-3


def _write_saved_model(folder: Path, parameters: Fixture) -> None:
    """VILA-R from its published description, in TensorFlow, independent of the torch port."""
    import tensorflow as tf

    side = int(np.sqrt(len(parameters["encoder.entry_stack.pos_emb.emb_var"])))
    patch = int(np.sqrt(len(parameters["encoder.entry_stack.patch_projection.linear.w"]) // 3))
    size = side * patch

    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameters = {name: tf.Variable(array) for name, array in parameters.items()}

        def norm(self, x, name):
            mean, variance = tf.nn.moments(x, -1, keepdims=True)
            scale, bias = self.parameters[f"{name}.scale"], self.parameters[f"{name}.bias"]
            return (x - mean) / tf.sqrt(variance + 1e-6) * (1 + scale) + bias

        def heads(self, x, name):
            return tf.einsum("bnd,dhk->bhnk", x, self.parameters[f"{name}.w"]) + self.parameters[f"{name}.b"][:, None]

        def attend(self, query, key, value, name, cap, causal):
            logits = tf.einsum("bhqk,bhnk->bhqn", query, key)
            if cap:
                logits = 50 * tf.tanh(logits / 50)
            if causal:
                length = query.shape[2]
                logits += tf.where(np.tril(np.ones((length, length))) > 0, 0.0, -1e9)
            out = tf.einsum("bhqn,bhnk->bqhk", tf.nn.softmax(logits), value)
            return tf.einsum("bqhk,dhk->bqd", out, self.parameters[f"{name}.w"]) + self.parameters[f"{name}.b"]

        def layer(self, x, name, activation, causal):
            y = self.norm(x, f"{name}.layer_norm")
            query, key, value = (self.heads(y, f"{name}.self_attention.{part}") for part in ("query", "key", "value"))
            query = query / np.sqrt(query.shape[-1]).astype(np.float32)
            x = x + self.attend(query, key, value, f"{name}.self_attention.post", True, causal)
            y = self.norm(x, f"{name}.ff_layer.layer_norm")
            for number, function in ((1, activation), (2, tf.identity)):
                linear = f"{name}.ff_layer.ffn_layer{number}"
                y = function(y @ self.parameters[f"{linear}.linear.w"] + self.parameters[f"{linear}.bias.b"])
            return x + y

        def pool(self, x, name):
            queries = self.parameters[f"{name}.pooling_attn_query"][None]
            query, key, value = (
                self.heads(y, f"{name}.pool_attn.{part}") for y, part in ((queries, "query"), (x, "key"), (x, "value"))
            )
            scale = tf.math.softplus(self.parameters[f"{name}.pool_attn.per_dim_scale.per_dim_scale"])
            query = query * scale * (1.442695041 / np.sqrt(query.shape[-1]).astype(np.float32))
            query = tf.repeat(query, tf.shape(x)[0], axis=0)
            return self.norm(
                self.attend(query, key, value, f"{name}.pool_attn.post", False, False), f"{name}.pool_attn_ln"
            )

        def text(self):
            width = self.parameters["cls_emb"].shape[-1]
            words = tf.gather(self.parameters["token_emb.emb_var"], [1, 391, 11]) * width**0.5
            rates = np.exp(-np.arange(width // 2) * np.log(1e4) / (width // 2 - 1))
            angles = np.arange(3)[:, None] * rates
            positions = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
            x = tf.concat([words + positions, self.parameters["cls_emb"][0] * width**0.5], 0)[None]
            for index in range(2):
                x = self.layer(x, f"unimodal_transformer.x_layers_{index}", tf.nn.relu, True)
            return self.norm(x, "unimodal_ln")[:, -1]

        @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="image_bytes")])
        def serve(self, image_bytes):
            image = tf.io.decode_image(image_bytes, 3, expand_animations=False)
            # the published 272 before 224, at this size
            image = tf.compat.v1.image.resize_bilinear(image[None], [size * 272 // 224] * 2)
            image = tf.image.resize_with_crop_or_pad(image, size, size) / 255
            x = tf.nn.space_to_depth(image, patch)  # rows, columns, channels of a patch, in that order
            x = tf.reshape(x, (1, side * side, patch * patch * 3))
            entry = "encoder.entry_stack."
            x = x @ self.parameters[f"{entry}patch_projection.linear.w"]
            x = x + self.parameters[f"{entry}patch_projection.bias.b"] + self.parameters[f"{entry}pos_emb.emb_var"]
            gelu = lambda y: tf.nn.gelu(y, approximate=False)  # noqa: E731
            for index in range(2):
                x = self.layer(x, f"encoder.transformers_stack.x_layers_{index}", gelu, False)
            x = self.pool(self.norm(x, "encoder.exit_stack.ln"), "generative_img_pooler")
            x = self.pool(x, "contrastive_img_pooler")[:, 0]
            x = x + x @ self.parameters["residual_ffn.linear.w"] + self.parameters["residual_ffn.bias.b"]
            score = tf.reduce_sum(
                tf.math.l2_normalize(x, -1) * tf.math.l2_normalize(self.text(), -1), -1, keepdims=True
            )
            return {"predictions": score}

    module = Model()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
