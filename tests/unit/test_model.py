"""Models: which matrices are pruned in every family, and messages about unusable checkpoints."""

import copy
import json
import pickle
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import DECODERS, FAMILIES, SIZE, refused, tiny_config, tiny_context, tiny_model
from transformers import AutoConfig, ViTConfig, WhisperConfig
from transformers.pytorch_utils import Conv1D

import raymask
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.scorers import SCORERS
from raymask.core.spec import QUICKSTART, Model
from raymask.data.hf_config import class_names, max_seq_length
from raymask.train.calibration import calibrate
from raymask.train.losses import TASK_LOSSES
from raymask.train.model import build_model, inspect_model, load_weights, read_config, state_tensors
from raymask.train.prunable import Sizes, block_parameters, count_sizes, find_prunable, matrices, transposed_weights

BERT_LIKE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BLOCKS = {
    "bert": ("bert.encoder.layer.{}", BERT_LIKE),
    "roberta": ("roberta.encoder.layer.{}", BERT_LIKE),
    "electra": ("electra.encoder.layer.{}", BERT_LIKE),
    "distilbert": (
        "distilbert.transformer.layer.{}",
        (*(f"attention.{part}_lin" for part in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
    ),
    "albert": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0",
        (*(f"attention.{part}" for part in ("query", "key", "value", "dense")), "ffn", "ffn_output"),
    ),
    "deberta-v2": (
        "deberta.encoder.layer.{}",
        (
            *(f"attention.self.{part}_proj" for part in ("query", "key", "value", "pos_key", "pos_query")),
            *BERT_LIKE[3:],
        ),
    ),
}
CLASSES = ("bad", "good")


@pytest.fixture(scope="module")
def bert():
    return build_model(tiny_config())


def loaded(folder, *, seed=0, fine_tuned=False, classes=CLASSES, **keys):
    """The weights of a saved model by name, as a search gets them."""
    model = Model(name=str(folder), **keys)
    source = inspect_model(model, read_config(model)[0], classes)
    return load_weights(model, source.config, seed, fine_tuned).views()


def decoded(folder, *, fine_tuned=False):
    """The same of a saved decoder."""
    model = Model(name=str(folder))
    source = inspect_model(model, read_config(model)[0], (), "causal-lm")
    return load_weights(model, source.config, 0, fine_tuned, source.kind).views()


def rewrite(folder, change):
    """Let `change` edit the saved tensors, a dict, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# Which matrices.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_weights_inside_the_blocks_are_pruned_and_nothing_else(family):
    prefix, parts = BLOCKS[family]
    layers = 1 if family == "albert" else 2  # ALBERT shares one block among its layers
    expected = [f"{prefix.format(layer)}.{part}.weight" for layer in range(layers) for part in parts]
    assert list(find_prunable(build_model(tiny_config(family)))) == expected


def test_a_family_of_many_blocks_is_found_whatever_it_is_called():
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(3)]
    module = torch.nn.ModuleDict({"inner": torch.nn.ModuleList(blocks), "head": torch.nn.Linear(4, 2)})
    assert find_prunable(module) == ("inner.0.0.weight", "inner.1.0.weight", "inner.2.0.weight")


def test_a_list_of_different_modules_or_without_linear_layers_is_no_encoder():
    mixed = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4))])
    norms = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)])
    assert find_prunable(torch.nn.ModuleDict({"mixed": mixed, "norms": norms})) == ()


@pytest.mark.parametrize(
    ("include", "exclude", "count"),
    [
        ((), ("*.query.weight",), 10),
        ((), ("*.layer.0.*", "*.layer.1.output.*"), 5),
        (("*.query.weight",), (), 2),
        (("*.query.weight",), ("*.1.*",), 1),
        (("bert.pooler.*", "classifier.*"), (), 2),
        (("*",), (), 14),
        ((), ("*embeddings*", "*LayerNorm*", "*bias"), 12),
    ],
)
def test_patterns_replace_the_choice_and_take_away_from_it(bert, include, exclude, count):
    assert len(find_prunable(bert, include, exclude)) == count


def test_patterns_keep_the_model_s_order(bert):
    found = find_prunable(bert, ("*.value.weight", "classifier.weight", "*.key.weight"))
    layers = [f"bert.encoder.layer.{layer}.attention.self" for layer in (0, 1)]
    assert found == (*(f"{layer}.{part}.weight" for layer in layers for part in ("key", "value")), "classifier.weight")


# Decoders.


@pytest.mark.parametrize(
    ("family", "prefix", "parts"),
    [
        (
            "llama",
            "model.layers.{}",
            (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))),
        ),
        ("gpt2", "transformer.h.{}", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ],
)
def test_a_decoder_s_matrices_inside_the_blocks_are_pruned_and_not_its_head(family, prefix, parts):
    module = build_model(tiny_config(family), kind="causal-lm")
    assert find_prunable(module) == tuple(f"{prefix.format(layer)}.{part}.weight" for layer in (0, 1) for part in parts)
    tied = module.lm_head.weight is module.get_input_embeddings().weight
    assert tied == (family == "gpt2")
    assert ("lm_head.weight" in find_prunable(module, ("*",))) == (not tied)


def untwisted(module):
    """The same decoder, whose Conv1D layers are linear ones of the same names, with their weights transposed."""
    twin = copy.deepcopy(module)
    for name, layer in module.named_modules():
        if isinstance(layer, Conv1D):
            linear = torch.nn.Linear(layer.nx, layer.nf)
            linear.weight, linear.bias = torch.nn.Parameter(layer.weight.detach().T.clone()), layer.bias
            twin.set_submodule(name, linear)
    return twin


@pytest.fixture(scope="module")
def twins():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model(tiny_config("gpt2"), kind="causal-lm").eval()
    return module, untwisted(module)


def test_transposed_weights_are_seen_as_those_of_linear_layers(twins):
    module, twin = twins
    names = find_prunable(module)
    assert names == find_prunable(twin)
    assert transposed_weights(module) == set(names)
    assert transposed_weights(twin) == frozenset()
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(module(input_ids=ids).logits, twin(input_ids=ids).logits)
    ours, theirs = matrices(module, names), matrices(twin, names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    source = inspect_model(Model(name="tiny"), tiny_config("gpt2"), (), "causal-lm")
    assert source.shapes == {name: tuple(weight.shape) for name, weight in twin.named_parameters() if name in names}


@pytest.mark.parametrize(
    ("allocation", "pattern"), [*product(ALLOCATIONS, ("unstructured", "8x2")), ("uniform", "n:4")]
)
@pytest.mark.parametrize("seed", [None, 3])
def test_transposed_weights_are_kept_as_those_of_linear_layers_are(twins, allocation, pattern, seed):
    ours, theirs = (raymask.draw_mask(m, 0.25, seed=seed, allocation=allocation, pattern=pattern) for m in twins)
    for name, kept in ours.items():
        assert kept.shape == twins[0].get_parameter(name).shape
        assert kept.is_contiguous()
        assert torch.equal(kept.T, theirs[name])
    if pattern == "n:4":
        assert all((kept.view(-1, 4, kept.shape[1]).sum(1) == 1).all() for kept in ours.values())


@pytest.mark.parametrize("score", SCORERS)
def test_transposed_weights_score_as_those_of_linear_layers_do(twins, score):
    data, names, seen = tiny_context("gpt2").data, find_prunable(twins[0]), []
    for module in twins:
        task_loss = TASK_LOSSES[data.kind]
        seen.append(calibrate(module, names, data.train, padding=data.padding, task_loss=task_loss))
    ours, theirs = (
        {name: SCORERS[score](weight, calibration[name]) for name, weight in matrices(module, names).items()}
        for module, calibration in zip(twins, seen, strict=True)
    )
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_a_pattern_that_does_not_divide_a_transposed_weight_is_refused_in_its_own_terms(twins):
    with pytest.raises(ValueError, match=r"^n:32 does not divide transformer\.h\.0\.attn\.c_attn\.weight of 48 x 16$"):
        raymask.draw_mask(twins[0], 0.5, pattern="n:32")


@pytest.mark.parametrize("family", DECODERS)
def test_a_saved_decoder_is_loaded_as_it_is_and_counts_as_fine_tuned(tmp_path, family):
    found = decoded(tiny_model(tmp_path, family), fine_tuned=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_a_decoder_keeps_its_configuration_and_all_its_positions(tmp_path):
    config = read_config(Model(name=str(tiny_model(tmp_path, "llama", pad_token_id=40))))[0]
    before = config.to_dict()
    inspect_model(Model(name="tiny"), config, (), "causal-lm")
    assert config.to_dict() == before
    assert max_seq_length(config) == 72


def test_a_head_that_is_not_tied_and_missing_is_refused_when_the_model_is_said_to_be_trained(tmp_path):
    rewrite(tiny_model(tmp_path, "llama"), lambda tensors: tensors.pop("lm_head.weight"))
    said = f"model.name: {tmp_path} is taken as fine-tuned (eval, and dense.epochs: 0), but it lacks lm_head.weight"
    assert refused(decoded, tmp_path, fine_tuned=True) == said


def test_a_decoder_without_its_tied_head_is_whole(tmp_path):
    tiny_model(tmp_path, "gpt2", head=False)
    assert "transformer.wte.weight" in decoded(tmp_path, fine_tuned=True)


def test_weights_of_another_vocabulary_are_refused(tmp_path):
    tiny_model(tmp_path, "gpt2")
    tiny_config("gpt2", vocab_size=80).save_pretrained(tmp_path)
    message = refused(decoded, tmp_path)
    assert "transformer.wte.weight has shape (72, 16), this task needs (80, 16). " in message
    assert message.endswith("Its config.json is another model's")


def test_an_encoder_is_no_language_model(tmp_path):
    message = refused(decoded, tiny_model(tmp_path, "bert"))
    assert message == f"model.name: {tmp_path} is no causal language model: it sees the tokens that it has to predict"


def test_a_model_that_speaks_no_language_is_refused():
    message = refused(inspect_model, Model(name="some/model"), ViTConfig(), (), "causal-lm")
    assert message.startswith("model.name: some/model cannot be built as a causal language model: ")


# Sizes.


def test_sizes_are_as_counted_by_hand(bert):
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    biases_and_norms = 2 * ((4 * 16 + 32 + 16) + 2 * 2 * 16)
    embeddings = (bert.config.vocab_size + 72 + 2 + 2) * 16  # words, positions, types, norm
    heads = 16 * 16 + 16 + 2 * 16 + 2
    expected = Sizes(matrices, matrices + biases_and_norms, matrices + biases_and_norms + embeddings + heads)
    assert count_sizes(bert, find_prunable(bert)) == expected


def test_the_encoder_is_never_smaller_than_what_is_pruned(bert):
    everything = find_prunable(bert, ("*",))
    sizes = count_sizes(bert, everything)
    assert sizes.prunable == 4096 + 16 * 16 + 2 * 16
    assert sizes.encoder == count_sizes(bert, ()).encoder + 16 * 16 + 2 * 16


def test_sparsities_state_all_three_denominators():
    assert Sizes(100, 150, 400).sparsities(75) == {"prunable": 0.75, "encoder": 0.5, "whole": 0.1875}


def test_minilm_has_36_matrices(minilm):
    model = Model(name=str(minilm))
    source = inspect_model(model, read_config(model)[0], CLASSES)
    assert len(source.prunable) == 36
    assert source.sizes.prunable == 10_616_832
    weights = load_weights(model, source.config, 0, False).views()
    assert sum(weights[name].numel() for name in source.prunable) == 10_616_832
    assert all(weight.dtype == torch.float32 for weight in weights.values() if weight.is_floating_point())


# What a search makes of a model.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite(tiny_model(tmp_path), lambda tensors: tensors[name][0, :2].fill_(value))
    said = f"model.name: {tmp_path} has 2 values in {name} that are NaN or infinite: its training diverged, or its file"
    assert refused(loaded, tmp_path).startswith(said)


@pytest.mark.parametrize("classes", [CLASSES, ("a", "b", "c"), ()])
def test_the_classifier_has_one_output_a_class_or_one_for_a_regression(classes):
    source = inspect_model(Model(name="tiny"), tiny_config(), classes)
    assert build_model(source.config).classifier.out_features == (len(classes) or 1)
    assert source.config.problem_type == ("single_label_classification" if classes else "regression")
    if classes:
        assert class_names(source.config) == classes
        assert source.config.label2id == {name: number for number, name in enumerate(classes)}


def test_class_names_are_in_the_order_of_their_numbers(tmp_path):
    config = tiny_config(id2label={number: f"class {number}" for number in reversed(range(12))})
    config.save_pretrained(tmp_path)
    assert class_names(AutoConfig.from_pretrained(tmp_path)) == tuple(f"class {number}" for number in range(12))


def test_what_persists_is_the_live_module_itself(bert):
    live = state_tensors(bert)
    assert set(live) == set(bert.state_dict())
    assert all(live[name].data_ptr() == tensor.data_ptr() for name, tensor in bert.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_shown_when_asked_for(family):
    module = build_model(tiny_config(family), show_attention=True).eval()
    found = module(input_ids=torch.tensor([[2, 7, 9, 3]]), output_attentions=True, output_hidden_states=True)
    assert [tuple(layer.shape) for layer in found.attentions] == [(1, 2, 4, 4)] * 2
    assert len(found.hidden_states) == 3
    assert all(torch.allclose(layer.sum(-1), torch.ones(1, 2, 4)) for layer in found.attentions)


# Weights.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_classifier_is_loaded_as_it_is(tmp_path, family):
    found = loaded(tiny_model(tmp_path, family), fine_tuned=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_missing_is_drawn_from_the_seed(tmp_path, family):
    tiny_model(tmp_path, family, head=False)
    first, again, other = (loaded(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    redrawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert redrawn
    assert all(name.startswith(("classifier.", "pre_classifier.", "pooler.")) for name in redrawn)
    assert "classifier.weight" in redrawn or "classifier.out_proj.weight" in redrawn


def test_loading_leaves_the_caller_s_random_state_alone(tmp_path):
    tiny_model(tmp_path, head=False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_loaded_as_float32(tmp_path):
    rewrite(tiny_model(tmp_path), lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    found = loaded(tmp_path, fine_tuned=True)
    assert {weight.dtype for weight in found.values() if weight.is_floating_point()} == {torch.float32}
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in saved.items())


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_in_bf16_where_that_is_asked_for(tmp_path, saved):
    rewrite(tiny_model(tmp_path), lambda tensors: tensors.update({n: t.to(saved) for n, t in tensors.items()}))
    found = loaded(tmp_path, fine_tuned=True, dtype="bf16")
    assert {weight.dtype for weight in found.values() if weight.is_floating_point()} == {torch.bfloat16}
    assert all(torch.equal(found[name], t.bfloat16()) for name, t in load_file(tmp_path / "model.safetensors").items())


def test_a_new_head_and_a_new_model_are_in_bf16_where_that_is_asked_for(tmp_path):
    tiny_model(tmp_path, head=False)
    first, again, other = (loaded(tmp_path, seed=seed, dtype="bf16")["classifier.weight"] for seed in (1, 1, 2))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert loaded(QUICKSTART, dtype="bf16")["classifier.weight"].dtype == torch.bfloat16


def test_the_quickstart_s_model_is_drawn_from_the_seed():
    model = Model(name=QUICKSTART)
    config, tokenizer = read_config(model)
    assert tokenizer("the film")["input_ids"][0] == tokenizer.cls_token_id
    first, again, other = (load_weights(model, config, seed, False) for seed in (1, 1, 2))
    assert (first.buffer == again.buffer).all()
    assert (first.buffer != other.buffer).any()


# Models that cannot be used.


def test_a_missing_head_is_refused_when_the_model_is_said_to_be_fine_tuned(tmp_path):
    tiny_model(tmp_path, head=False)
    expected = "is taken as fine-tuned (eval, and dense.epochs: 0), but it lacks classifier.bias, classifier.weight"
    assert refused(loaded, tmp_path, fine_tuned=True) == f"model.name: {tmp_path} {expected}"


def test_a_head_of_other_classes_is_refused_with_that_reason(tmp_path):
    tiny_model(tmp_path, num_labels=3)
    message = refused(loaded, tmp_path)
    assert message.startswith(f"model.name: {tmp_path} cannot be loaded")
    assert "classifier" in message


@pytest.mark.parametrize("change", ["missing", "empty"])
def test_a_folder_that_is_no_model_is_refused_with_what_it_needs(tmp_path, change):
    folder = tmp_path / "model"
    if change == "empty":
        folder.mkdir()
        message = refused(read_config, Model(name=str(folder)))
        assert "the folder needs config.json, model.safetensors and a tokenizer" in message
    else:
        message = refused(read_config, Model(name=str(folder)))
        assert "it is neither a folder here nor reachable on the hub: check the name, or the network" in message
    assert message.startswith(f"model.name: {folder} cannot be loaded: ")
    assert len(message.splitlines()) == 1


def test_a_hub_id_that_cannot_be_reached_is_refused():
    message = refused(read_config, Model(name="nobody/nothing-of-this-name"))
    expected = (
        "model.name: nobody/nothing-of-this-name cannot be loaded: "
        "it is neither a folder here nor reachable on the hub: check the name, or the network ("
    )
    assert message.startswith(expected)
    assert len(message.splitlines()) == 1


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_read(tmp_path, name):
    folder, sprung = tiny_model(tmp_path / "model"), tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"classifier.weight": Trap(sprung)}))
    message = refused(loaded, folder)
    assert "the folder needs config.json, model.safetensors and a tokenizer" in message
    assert not sprung.exists()
    pickle.loads((folder / name).read_bytes())["classifier.weight"].close()  # noqa: S301 - the trap would have worked
    assert sprung.exists()


@pytest.mark.parametrize("config", [ViTConfig(), WhisperConfig()], ids=["vision", "speech"])
def test_a_model_that_classifies_no_sequences_is_refused(config):
    message = refused(inspect_model, Model(name="some/model"), config, CLASSES)
    assert message.startswith("model.name: some/model cannot be built as a sequence classifier: ")
    assert len(message.splitlines()) == 1


def test_a_model_without_linear_layers_is_refused():
    small = AutoConfig.for_model("gpt2", n_embd=16, n_layer=0, n_head=2, vocab_size=50)
    message = refused(inspect_model, Model(name="gpt2"), small, CLASSES)
    assert message == "model: no matrix of gpt2 can be pruned"


def test_a_model_whose_layers_cannot_run_again_is_refused_where_they_would_have_to():
    config = tiny_config("albert")
    message = refused(inspect_model, Model(name="some/albert"), config, CLASSES, gradient_checkpointing=True)
    assert message == (
        "gradient_checkpointing: some/albert does not support it: remove it, and lower batch_size in dense, early_eval "
        "and finetune if memory runs out"
    )
    assert inspect_model(Model(name="some/albert"), config, CLASSES).prunable


@pytest.mark.parametrize("keys", [{"include": ("*.key.weight",), "exclude": ("*",)}, {"exclude": ("*",)}])
def test_patterns_that_leave_nothing_to_prune_are_refused(keys):
    message = refused(inspect_model, Model(name="tiny", **keys), tiny_config(), CLASSES)
    assert message == "model: no matrix of tiny can be pruned: model.include and model.exclude leave none"


def test_a_checkpoint_that_lacks_encoder_weights_is_refused(tmp_path):
    lost = ("bert.encoder.layer.0.attention.self.key.bias", "bert.encoder.layer.1.output.dense.weight")
    rewrite(tiny_model(tmp_path), lambda tensors: [tensors.pop(name) for name in lost])
    message = refused(loaded, tmp_path)
    assert message == f"model.name: {tmp_path} has no weights for {lost[0]} and 1 more of its body"


@pytest.mark.parametrize(
    "lost", ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias"], ids=["words", "norm"]
)
def test_a_checkpoint_that_lacks_embeddings_is_refused(tmp_path, lost):
    rewrite(tiny_model(tmp_path), lambda tensors: tensors.pop(lost))
    assert f"{tmp_path} has no weights for {lost}" in refused(loaded, tmp_path)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    tiny_model(tmp_path, "distilbert")
    tiny_config("bert").save_pretrained(tmp_path)
    assert "has no weights for bert.embeddings.LayerNorm.bias" in refused(loaded, tmp_path)


def test_a_checkpoint_without_a_pooler_is_used(tmp_path):
    tiny_model(tmp_path, head=False)
    rewrite(tmp_path, lambda tensors: [tensors.pop(f"pooler.dense.{part}") for part in ("weight", "bias")])
    found = loaded(tmp_path)
    assert found["bert.pooler.dense.weight"].std() > 0


def test_the_blocks_of_the_smallest_encoder_are_found():
    module = build_model(tiny_config(**SIZE | {"num_hidden_layers": 1}))
    assert len(find_prunable(module)) == 6
    assert all(name.startswith("bert.encoder.layer.0.") for name in block_parameters(module))


def test_code_that_a_model_brings_along_is_refused_unless_it_is_trusted(tmp_path):
    tiny_model(tmp_path)
    code = "open({!r}, 'w').close()\nfrom transformers import BertConfig as Own\n".format(str(tmp_path / "ran"))
    (tmp_path / "configuration_own.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(read_config, Model(name=str(tmp_path)))
    assert "it brings code of its own, which runs only with model.trust_remote_code: true" in message
    assert not (tmp_path / "ran").exists()
