"""Our adapter beside lm-evaluation-harness's own HFLM, on the same weights and the same tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from surgery.nanochat_folders import random_nanochat

from megatron_adamba.errors import ConfigError
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.writing import write_job

pytestmark = pytest.mark.oracle
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "what", "it", "was"]
LENGTH = 24
VOCABULARY = 275


def make_tokenizer(path: Path) -> Path:
    """Merges of a few words over bytes; with special tokens it puts <|endoftext|> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) * 3], trainer)
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[end])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(make ours, make theirs), each taking what differs."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("harness")
    file = make_tokenizer(folder / "tokenizer.json")
    size = PreTrainedTokenizerFast(tokenizer_file=str(file)).vocab_size
    model = random_nanochat(vocab_size=size, max_position_embeddings=512, eos_token_id=0, bos_token_id=0)
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.json").write_bytes(file.read_bytes())
    write_job(import_hugging_face(folder / "hf"), folder / "ours", 10**9, lambda *_: None)

    def ours(**settings):
        from megatron_adamba.commands.harness import AdambaLM

        return AdambaLM(str(folder / "ours"), dtype="fp32", batch_size=3, **{"max_length": LENGTH, **settings})

    def theirs(**settings):
        ends = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|endoftext|>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="left", **ends)
        settings = {"max_length": LENGTH, "add_bos_token": True, "batch_size": 3, **settings}
        return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **settings)

    return ours, theirs


def ask(kind: str, *arguments, number: int = 0):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=number)


def texts(seed: int, count: int, most: int) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(random_.choice([*WORDS, "häuser", "→", "x1"]) for _ in range(n % most + 1)) for n in range(count)]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_scores(both, add_bos_token):
    """Contexts shorter than the limit, as long and longer, empty ones, spaces in between."""
    ours, theirs = both
    pairs = [(a, " " + b) for a, b in zip(texts(1, 40, 20), texts(2, 40, 5))]
    pairs += [("", "the cat"), ("the cat ", "sat"), ("a \n ", " mat"), ("sa", "t on")]
    # without the token in front, a context of one token has nothing to predict its own from
    asked = [ask("loglikelihood", *pair) for pair in pairs]
    found = ours(add_bos_token=add_bos_token).loglikelihood(asked)
    wanted = theirs(add_bos_token=add_bos_token).loglikelihood(asked, disable_tqdm=True)
    for pair, (score, greedy), (their_score, their_greedy) in zip(pairs, found, wanted, strict=True):
        assert score == pytest.approx(their_score, abs=1e-4), pair
        assert greedy == their_greedy


def test_rolling_scores(both):
    """Texts of every length around the windows' borders."""
    ours, theirs = both
    asked = [ask("loglikelihood_rolling", text) for text in texts(3, 36, 36)]
    wanted = theirs(add_bos_token=False).loglikelihood_rolling(asked, disable_tqdm=True)
    for own in (ours(), ours(add_bos_token=False)):
        assert own.loglikelihood_rolling(asked) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("alias", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_greedy_texts(both, alias):
    """Also behind contexts that are longer than the room there is for them."""
    ours, theirs = both
    settings = {alias: 7, "until": [" a", "o"], "do_sample": False, "temperature": 0.7}
    asked = [ask("generate_until", text, dict(settings)) for text in texts(4, 24, 24)]
    # one at a time: padding in front changes their numbers
    wanted = theirs(batch_size=1).generate_until(asked, disable_tqdm=True)
    assert ours().generate_until(asked) == wanted and len(set(wanted)) > 3
    unbounded = [ask("generate_until", text, {alias: 7}) for text in texts(4, 6, 6)]
    assert ours().generate_until(unbounded) == theirs(batch_size=1).generate_until(unbounded, disable_tqdm=True)


def test_sampled_texts_of_equal_requests_differ(both):
    """As `repeats` asks for them; a temperature is enough, and the same seed gives the same texts."""
    ours, _ = both
    settings = {"max_gen_toks": 8, "until": [], "temperature": 1.5}
    asked = [ask("generate_until", "the cat", dict(settings))] * 16
    found = ours(seed=1).generate_until(asked)
    assert len(set(found)) > 12
    assert ours(seed=1).generate_until(asked) == found and ours(seed=2).generate_until(asked) != found
    # whatever is asked beside them
    others = [ask("generate_until", "a mat", dict(settings)), *asked]
    assert ours(seed=1).generate_until(others)[1:] == found
    greedy = [ask("generate_until", "the cat", {**settings, "do_sample": False})] * 3
    assert len(set(ours().generate_until(greedy))) == 1
    torch.manual_seed(5)
    first = ours().generate_until(asked)
    torch.manual_seed(6)
    assert ours().generate_until(asked) != first


def test_what_is_refused(both):
    ours, _ = both
    with pytest.raises(ConfigError, match="--model_args exit_treshold: is not known"):
        ours(exit_treshold=0.5)
    with pytest.raises(ConfigError, match="max_gen_toks 24: must be 1 or more, and leave room"):
        ours().generate_until([ask("generate_until", "a", {"max_gen_toks": 24})])
    with pytest.raises(ConfigError, match=r"a continuation has .* tokens; give max_length="):
        ours().loglikelihood([ask("loglikelihood", "a", " →" * 30)])
    for name in ("max_length", "width", "seed", "exit_threshold"):
        with pytest.raises(ConfigError, match=f"--model_args {name}=x: must be a"):
            ours(**{name: "x"})
    for name, value in (("max_gen_toks", 2.5), ("max_length", True)):
        with pytest.raises(ConfigError, match=f"--model_args {name}={value}: must be a whole number"):
            ours(**{name: value})
    with pytest.raises(ConfigError, match="--model_args max_length 0: must be above 0"):
        ours(max_length=0)
    assert ours().loglikelihood([ask("loglikelihood", "", ""), ask("loglikelihood", "a", "")]) == [(0.0, True)] * 2
    assert ours().loglikelihood_rolling([ask("loglikelihood_rolling", "")]) == [0.0]
    # half of a pair
    assert ours().loglikelihood([ask("loglikelihood", "a\ud800", "b")])[0][0] < 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "temperature=0.0: do_sample needs one above 0; for example temperature=1.0"),
        ({"do_sample": True, "temperature": 0}, "temperature=0.0: do_sample needs one above 0"),
        ({"do_sample": "yes"}, "do_sample=yes: must be true or false"),
        ({"temperature": -1}, "temperature=-1.0: must be 0 or more"),
        ({"temperature": "abc"}, "temperature=abc: must be a number"),
        ({"temperature": True}, "temperature=True: must be a number"),
        ({"temperature": float("nan")}, "temperature=nan: must be 0 or more"),
        ({"temperature": 1, "top_k": "x"}, "top_k=x: must be a whole number"),
        ({"temperature": 1, "top_k": 2.5}, "top_k=2.5: must be a whole number"),
        ({"max_tokens": "many"}, "max_tokens=many: must be a whole number"),
        ({"until": [1]}, r"until=\[1\]: must be a text or a list of texts"),
        ({"until": {"a": 1}}, r"until=\{'a': 1\}: must be a text or a list of texts"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(both, settings, message):
    ours, _ = both
    with pytest.raises(ConfigError, match="--gen_kwargs " + message) as caught:
        ours().generate_until([ask("generate_until", "the cat", settings)])
    assert "\n" not in str(caught.value)


def test_numbers_in_words_and_nulls_are_settings(both):
    ours, _ = both
    asked = lambda settings: [ask("generate_until", "the cat", {"max_gen_toks": 8, **settings})] * 3
    given = {"temperature": 0.5, "top_k": 3}
    texts_of = lambda settings: ours(seed=1).generate_until(asked(settings))
    assert len(texts_of({"temperature": "0.5", "top_k": "3"})) == len(texts_of(given)) == 3
    assert texts_of({"until": None, "temperature": None, "top_k": None}) == texts_of({})


def test_a_context_of_white_space_is_an_empty_one(both):
    """All of it is the continuation's."""
    ours, _ = both
    for own in (ours(), ours(add_bos_token=False)):
        (score,) = own.loglikelihood([ask("loglikelihood", " \n", "cat")])
        (wanted,) = own.loglikelihood([ask("loglikelihood", "", " \ncat")])
        assert score == pytest.approx(wanted, abs=1e-4)
