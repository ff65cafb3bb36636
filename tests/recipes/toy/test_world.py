"""The toy's problems, styles, committed data and base tokenizer. CPU, seconds."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from toy import world

from trl_tinylora.tasks import gsm8k


TOY = Path(__file__).parents[3] / "recipes" / "toy"


@pytest.fixture(scope="module")
def splits():
    return world.make_splits()


@pytest.fixture(scope="module")
def past():
    """20,000 texts of the base's past."""
    return list(world.pretraining_texts(seed=0, count=20_000))


def recompute(expression):
    left, operator, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    left, right = int(left), int(right)
    if operator == "/":
        assert left % right == 0, expression
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def assert_calculations_are_right(calculations, answer_text):
    assert calculations
    for expression, result in calculations:
        assert recompute(expression) == int(result), answer_text
    assert gsm8k.gold_answer(answer_text) == calculations[-1][1], answer_text


def marked_calculations(answer_text):
    marks = re.findall(r"<<(.+?)=(\d+)>>(\d+)", answer_text)
    assert all(result == repeated for _, result, repeated in marks), answer_text
    return [(expression, result) for expression, result, _ in marks]


@pytest.mark.parametrize("split", world.SPLITS)
def test_committed_data_equals_the_regenerated_bytes(splits, split):
    committed = (TOY / "data" / f"{split}.jsonl").read_bytes()
    assert committed == world.rows_as_jsonl(splits[split]).encode("utf-8")


def test_other_seeds_give_other_problems(splits):
    assert world.make_splits(seed=world.SEED + 1)["test"] != splits["test"]


def test_no_question_occurs_twice_in_or_across_splits(splits):
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert {split: len(problems) for split, problems in splits.items()} == world.SPLITS
    assert len(set(questions)) == len(questions) == sum(world.SPLITS.values())


def test_every_split_holds_one_two_and_three_steps_and_every_operator(splits):
    for problems in splits.values():
        lengths = Counter(len(problem.steps) for problem in problems)
        assert set(lengths) == {1, 2, 3}
        assert min(lengths.values()) > 0.15 * len(problems)
        assert {step.operator for problem in problems for step in problem.steps} == set("+-*/")


def test_gold_answers_are_right_by_recomputation(splits):
    for problems in splits.values():
        for problem in problems:
            assert_calculations_are_right(marked_calculations(world.gold_text(problem)), world.gold_text(problem))


def test_the_recomputation_notices_a_wrong_gold_answer(splits):
    text = world.gold_text(splits["test"][0])
    with pytest.raises(AssertionError):
        assert_calculations_are_right(marked_calculations(text), re.sub(r"#### \d+", "#### 0", text))
    with pytest.raises(AssertionError):
        assert_calculations_are_right(marked_calculations(re.sub(r"=(\d+)>>\1", "=0>>0", text)), text)


def test_every_number_needed_stands_in_the_question(splits):
    for problem in splits["train"]:
        told = Counter(re.findall(r"\d+", problem.question))
        needed = Counter([str(problem.steps[0].left)] + [str(step.right) for step in problem.steps])
        assert told == needed, problem
        assert all(1 <= step.result <= world.LARGEST for step in problem.steps)
        assert all(after.left == before.result for before, after in zip(problem.steps, problem.steps[1:], strict=False))


def test_committed_rows_load_as_gsm8k_rows(splits):
    rows = gsm8k.load_rows(str(TOY / "data"), split="validation")
    assert gsm8k.for_rl(rows)["answer"][:] == [str(problem.answer) for problem in splits["validation"]]


def test_the_past_is_deterministic_and_holds_no_committed_question(splits, past):
    assert list(world.pretraining_texts(seed=0, count=200)) == past[:200]
    assert list(world.pretraining_texts(seed=1, count=200)) != past[:200]
    committed = {problem.question for problems in splits.values() for problem in problems}
    assert not committed & {text.question for text in past}


def shares_of(texts):
    return {
        style: count / len(texts) for style, count in Counter(world.style_of(text.answer) for text in texts).items()
    }


def test_style_shares_without_a_request_are_as_stated(past):
    shares = shares_of([text for text in past if not text.request])
    assert set(shares) == set(world.STYLES)
    assert shares["gold"] == pytest.approx(world.GOLD_SHARE, abs=0.006)
    assert shares["ramble"] == pytest.approx(world.RAMBLE_SHARE, abs=0.02)
    assert shares["worked"] == pytest.approx(0.252, abs=0.02)
    assert shares["careless"] == pytest.approx(0.288, abs=0.02)


def test_half_of_the_past_is_in_the_style_that_was_asked_for(past):
    requested = [text for text in past if text.request]
    assert len(requested) / len(past) == pytest.approx(world.REQUEST_SHARE, abs=0.02)
    assert all(text.request == world.REQUESTS[world.style_of(text.answer)] for text in requested)
    assert shares_of(requested) == pytest.approx(world.REQUESTED_SHARES, abs=0.02)
    assert sum(world.REQUESTED_SHARES.values()) == pytest.approx(1.0)


def test_style_shares_are_a_distribution_for_every_problem(splits):
    for problem in splits["train"]:
        shares = world.style_shares(problem)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) > 0.01


def test_worked_answers_are_always_right_and_rambles_never_reach_the_marker(past):
    found = Counter()
    for text in (text.answer for text in past):
        style = world.style_of(text)
        found[style] += 1
        if style == "worked":
            assert_calculations_are_right(re.findall(r"^(\d+[-+*/]\d+)=(\d+)$", text, re.MULTILINE), text)
        elif style == "gold":
            assert_calculations_are_right(marked_calculations(text), text)
        elif style == "ramble":
            assert gsm8k.extract_strict(text) is None
    assert min(found.values()) > 100


def test_careless_answers_are_hardly_ever_right(splits):
    right = [
        gsm8k.is_correct(gsm8k.extract_strict(world.careless_text(problem)), str(problem.answer))
        for problem in splits["train"]
    ]
    assert sum(right) / len(right) < 0.06


def test_an_unknown_style_is_refused(splits):
    with pytest.raises(ValueError, match="style must be one of .* got 'verse'"):
        world.answer_in_style(splits["test"][0], "verse", world.random.Random(0))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    base = TOY / "base"
    assert base.is_dir(), f"{base} is missing: run recipes/toy/pretrain.py"
    return AutoTokenizer.from_pretrained(base)


def test_reloaded_tokenizer_encodes_as_the_saved_one(tokenizer, past):
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(TOY / "base" / "tokenizer.json"))
    texts = [part for text in past[:500] for part in (text.request, text.question, text.answer)]
    texts += [
        gsm8k.build_prompt(past[0].question)[0]["content"],
        "3.14, $1,080 and 'naïve' words\n\n#### -7",
        "  ",
        "<|im_end|>",
    ]
    for text in texts:
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"] == saved.encode(text, add_special_tokens=False).ids
        )
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_its_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]


def test_numbers_are_single_tokens(tokenizer):
    for number in range(world.LARGEST + 1):
        assert tokenizer.tokenize(f"22+{number}=") == ["22", "+", str(number), "="]


def test_the_rendered_prompt_is_a_prefix_of_the_rendered_conversation(tokenizer, splits):
    for problem in splits["test"][:100]:
        prompt = gsm8k.build_prompt(problem.question)
        for text in (world.gold_text(problem), world.worked_text(problem), ""):
            conversation = [*prompt, {"role": "assistant", "content": text}]
            prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            whole_ids = tokenizer.apply_chat_template(conversation, return_dict=False)
            assert whole_ids[: len(prompt_ids)] == prompt_ids
            answer_ids = tokenizer.encode(f"{text}<|im_end|>\n", add_special_tokens=False)
            assert whole_ids[len(prompt_ids) :] == answer_ids


def test_completions_stay_short(tokenizer, splits):
    problems = [problem for split in splits.values() for problem in split]
    longest = {
        style: max(
            len(tokenizer.encode(write(problem) + "<|im_end|>", add_special_tokens=False)) for problem in problems
        )
        for style, write in (("worked", world.worked_text), ("gold", world.gold_text))
    }
    assert longest["worked"] <= 40
    assert longest["gold"] <= 64


def test_base_is_a_small_float32_qwen2_that_stops_at_the_turns_end(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TOY / "base")
    assert model.config.model_type == "qwen2"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) <= 1000
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    linears = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 28
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert (TOY / "base" / "model.safetensors").stat().st_size < 4_000_000


def test_the_bases_report_states_latent_ability_and_an_unsteady_style():
    report = json.loads((TOY / "base" / "report.json").read_text(encoding="utf-8"))
    measured = report["validation"]
    assert {"config", "versions", "machine", "num_parameters", "train_seconds"} <= set(report)
    assert measured["num_problems"] == world.SPLITS["validation"]
    assert 0.20 <= measured["sampled_strict"] <= 0.35
    assert 0.10 <= measured["greedy_strict"] <= 0.60
    assert measured["forced_worked_greedy_strict"] >= 0.98
    assert measured["forced_gold_greedy_strict"] >= 0.95
