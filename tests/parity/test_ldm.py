"""LDM's UNet and text encoder against the numbers of CompVis, diffusers and PaddleMIX, through `weights import` and as they
are named where weights are asked for.
"""

import json
import shutil

import pytest
import torch
from diffusers.pipelines.latent_diffusion import LDMBertModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from core.models.image_unet import ImageUNet
from core.models.ldm_bert import LDMBertEncoder
from core.slots import LDMBert, LDMUNet
from core.weights.importer import import_weights
from core.weights.lazy import lazily
from core.weights.ldm import unet_from_compvis
from core.weights.load import load_component
from core.weights.networks import recognised
from core.weights.paddle import matrices
from tests.parity.recorded import GOLDEN, GRADIENT, recorded
from tests.parity.test_lvdm_fill import _cosine, _filled, _is

WITHIN = {"rtol": 0.0, "atol": 1e-4}
PREFIXES = {"ldm-unet": "model.diffusion_model.", "ldmbert": "cond_stage_model."}


def _published(name, folder):
    """A golden case as its makers publish it: Paddle's file, CompVis' checkpoint, or plain tensors."""
    if name.endswith("-paddle"):
        return GOLDEN / name / "model_state.pdparams"
    case, path = recorded(name), folder / f"{name}.ckpt"
    state = {PREFIXES.get(name, "") + n: t for n, t in case.weights.items()}
    torch.save({"state_dict": state | {"betas": torch.zeros(1000)}} if name in PREFIXES else state, path)
    return path


def _text(folder, logits=False):
    config = json.loads((folder / "config.json").read_text())
    known = LDMBertEncoder.__init__.__wrapped__.__code__.co_varnames
    return LDMBertEncoder(**{n: v for n, v in config.items() if n in known} | {"logits": logits}).eval()


@pytest.mark.parametrize("name", ["ldm-unet", "diffusers-unet2d"])
def test_unets_come_through_the_import_with_the_numbers_and_gradients_of_the_original(name, tmp_path):
    case = recorded(name)
    (done,) = import_weights(_published(name, tmp_path), tmp_path / "out")
    assert (done.component, done.tensors, any(done.wrong)) == ("unet", 208, False)
    assert json.loads((done.folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    with torch.device("meta"):
        unet = ImageUNet.from_config(ImageUNet.load_config(done.folder)).eval()
    load_component(unet, str(done.folder), "unet")
    for variant in ("main", "other", "faint"):
        x, context = (case.inputs[f"{variant}.{key}"].requires_grad_() for key in ("x", "context"))
        y = unet(x[:, :, None], case.inputs[f"{variant}.timesteps"], context)[:, :, 0]
        assert_close(y, case.outputs[f"{variant}.y"], **WITHIN)
        if variant == "main":
            gradients = torch.autograd.grad((y * case.inputs["main.cotangent"]).sum(), (x, context))
            assert_close(gradients[0], case.outputs["main.grad_x"], **GRADIENT)
            assert_close(gradients[1], case.outputs["main.grad_context"], **GRADIENT)


@pytest.mark.parametrize("name", ["ldmbert", "diffusers-ldmbert", "ldmbert-paddle"])
@torch.no_grad()
def test_text_encoders_come_through_the_import_and_open_in_stock_diffusers(name, tmp_path):
    case = recorded(name)
    (done,) = import_weights(_published(name, tmp_path), tmp_path / "out")
    assert (done.component, done.tensors, any(done.wrong)) == ("text_encoder", len(case.weights), False)
    stock = LDMBertModel.from_pretrained(done.folder).eval()
    for logits in (False, True):  # a network without the unused head takes the same folder
        text = _text(done.folder, logits)
        load_component(text, str(tmp_path / "out"), "text_encoder")
        for variant in ("main", "short"):
            tokens, expected = case.inputs[f"{variant}.tokens"], case.outputs[f"{variant}.embeddings"]
            assert_close(text(tokens), expected, **WITHIN)
            assert_close(stock(tokens, return_dict=False)[0], expected, **WITHIN)
    stored = load_file(done.folder / "model.safetensors")
    head = next(tensor for n, tensor in case.weights.items() if n.endswith("to_logits.weight"))
    assert torch.equal(stored["to_logits.weight"], head.T if name.endswith("-paddle") else head)


def test_paddle_keeps_exactly_the_matrices_of_the_text_encoder_s_linear_layers_transposed():
    case = recorded("ldmbert-paddle")
    text = LDMBertEncoder(101, 12, 2, 128, 8, 64, 32, logits=True)
    assert matrices(text) == set(case.config["linear_weights_in_out"])


@torch.no_grad()
def test_the_old_names_of_paddlemix_come_through_too_with_zeros_for_the_head_they_lack(tmp_path):
    case = recorded("diffusers-ldmbert")
    renamed = {}
    for name, tensor in case.weights.items():
        for new, old in (
            ("model.embed_tokens.", "embeddings.word_embeddings."), ("model.embed_positions.", "embeddings.position_embeddings."),
            ("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2"), ("fc1", "linear1"), ("fc2", "linear2"),
            ("model.layer_norm.", "final_layer_norm."), ("model.layers.", "encoder.layers."),
        ):  # fmt: skip
            name = name.replace(new, old)
        if not name.startswith("to_logits"):
            renamed[name] = tensor
    save_file(renamed, tmp_path / "old.safetensors")
    (done,) = import_weights(tmp_path / "old.safetensors", tmp_path / "out")
    assert not any(done.wrong)
    stock = LDMBertModel.from_pretrained(done.folder).eval()
    tokens = case.inputs["main.tokens"]
    assert_close(stock(tokens, return_dict=False)[0], case.outputs["main.embeddings"], **WITHIN)
    assert not stock.to_logits.weight.any()


def test_a_whole_checkpoint_of_compvis_gives_all_three_networks(tmp_path):
    state = {"betas": torch.zeros(1000)}  # among a dozen tables of the schedule
    for name, prefix in {**PREFIXES, "ldm-vae-kl": "first_stage_model."}.items():
        state |= {prefix + n: tensor for n, tensor in recorded(name).weights.items()}
    torch.save({"state_dict": state, "global_step": 390_000}, tmp_path / "model.ckpt")
    done = {d.component: d for d in import_weights(tmp_path / "model.ckpt", tmp_path / "out")}
    assert {n: d.tensors for n, d in done.items()} == {"text_encoder": 32, "unet": 208, "vae": 124}
    assert not any(any(d.wrong) for d in done.values())


def test_a_pipeline_folder_gives_all_three_networks_and_its_tokenizer_whatever_its_folders_are_called(tmp_path):
    """As ppdiffusers and the hub's ldm-text2im-large-256 lay it out: vqvae, bert, unet, tokenizer."""
    published = tmp_path / "published"
    for name, folder in (("ldmbert-paddle", "bert"), ("diffusers-unet2d", "unet"), ("diffusers-vae-kl", "vqvae")):
        (published / folder).mkdir(parents=True)
        if name.endswith("-paddle"):
            for file in ("model_state.pdparams", "model_config.json"):
                shutil.copy(GOLDEN / name / file, published / folder / file)
        else:
            torch.save(recorded(name).weights, published / folder / "diffusion_pytorch_model.bin")
            config = recorded(name).config["constructor"]
            (published / folder / "config.json").write_text(json.dumps(config))
    (published / "model_index.json").write_text("{}")
    (published / "tokenizer").mkdir()
    (published / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    done = {d.component: d for d in import_weights(published, tmp_path / "out")}
    assert {n: d.tensors for n, d in done.items()} == {"text_encoder": 32, "unet": 208, "vae": 124}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"text_encoder", "unet", "vae", "tokenizer"}
    text, unet = _text(done["text_encoder"].folder), ImageUNet.from_config(ImageUNet.load_config(done["unet"].folder))
    for module, part in ((text, "text_encoder"), (unet, "unet")):
        load_component(module, str(published), part)  # and without an import
        fresh = {n: t.clone() for n, t in module.state_dict().items()}
        load_component(module, str(tmp_path / "out"), part)
        assert all(torch.equal(t, fresh[n]) for n, t in module.state_dict().items())


def _compvis_names(unet):
    """The names that CompVis gives the tensors of a UNet of four levels of two blocks (LDM sheet, section 8.3)."""
    ends = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
            "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for i in range(4):
        for j in range(2):
            ends |= {
                f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{3 * i + j + 1}.{k}"
                for k, kind in enumerate(("resnets", "attentions"))
            }
        for j in range(3):
            ends |= {
                f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{3 * i + j}.{k}"
                for k, kind in enumerate(("resnets", "attentions"))
            }
        if i < 3:
            ends[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
            ends[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.conv"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
             "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    names = {}
    for name in unet.state_dict():
        stem = next(s for s in sorted(ends, key=len, reverse=True) if name.startswith(f"{s}."))
        head, _, rest = name.removeprefix(f"{stem}.").partition(".")
        inside = f"{inner[head]}.{rest}" if "resnets" in stem else f"{head}.{rest}".rstrip(".")
        names[f"{ends[stem]}.{inside}"] = name
    return names


def _differing(config, other):
    return {n: v for n, v in config.items() if v != other[n] and not n.startswith("_")}


def test_all_686_names_of_the_published_unet_are_translated_and_its_sizes_told():
    with torch.device("meta"):
        unet = LDMUNet().build()
    names = _compvis_names(unet)
    assert len(names) == 686
    own = lazily(unet.state_dict())
    state = {theirs: own[ours] for theirs, ours in names.items()}
    renamed = unet_from_compvis(state)
    assert renamed.keys() == own.keys() and all(renamed[ours] is state[theirs] for theirs, ours in names.items())
    network = recognised(state)
    with torch.device("meta"):
        again = network.kind()(**network.arguments(renamed, {}))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in unet.state_dict().items()}
    assert _differing(again.config, unet.config) == {}


def test_the_sizes_of_the_published_text_encoders_are_told_from_shapes():
    for slot in (LDMBert(), LDMBert(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)):
        with torch.device("meta"):
            text = slot.build()
        state = lazily(text.state_dict())
        network = recognised(state)
        with torch.device("meta"):
            again = network.kind()(**network.arguments(network.rename(state), {}))
        assert _differing(again.config, text.config) == {}


@torch.no_grad()
def test_networks_filled_with_sines_give_the_original_s_figures():
    text = _filled(LDMBertEncoder(50, 8, 2, 64, 4, 8, 32))
    assert sum(p.numel() for p in text.parameters()) + 50 * 33 == 20_466
    _is(
        text(torch.tensor([[1, 7, 3, 2, 0, 0, 0, 0]])),
        0.005085,
        0.999716,
        -1.55444,
        1.15250,
        -0.10175,
        0.51139,
        -0.59007,
    )
    unet = LDMUNet(block_out_channels=(32, 64), layers_per_block=1, num_heads=4, context_dim=16).build()
    assert (sum(p.numel() for p in unet.parameters()), len(unet.state_dict())) == (787_844, 208)
    y = _filled(unet)(_cosine(1, 4, 1, 8, 8), torch.tensor([37]), _cosine(1, 5, 16, step=0.23))
    _is(y, 0.044945, 1.042959, 0.48398, 0.72179, 1.07147, 1.59614, 0.12180)
