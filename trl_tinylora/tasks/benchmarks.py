"""The published data sets: where on the Hub they lie, and which columns hold question and gold answer.

None could be downloaded where this was written. Names, splits, columns and counts were read in other people's loaders
and on stored pages of the Hub; what each entry rests on stands beside it. A count that differs is warned about.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """
    One data set on the Hub.

    Args:
        name (`str`): What `evaluate.py --benchmark` calls it.
        task (`str`): One of [`~trl_tinylora.tasks.TASKS`].
        dataset_name (`str`): Its name on the Hub.
        split (`str`): Its split.
        question (`str`): Column of the question.
        answer (`str`): Column of the gold answer.
        n_problems (`int`): Rows of the split.
        config (`str`, *optional*): Its configuration.
        has_folders (`bool`, *optional*, defaults to `False`): Whether `config` is no configuration but a folder of
            `{split}.parquet` files.
    """

    name: str
    task: str
    dataset_name: str
    split: str
    question: str
    answer: str
    n_problems: int
    config: str | None = None
    has_folders: bool = False


_TABLE = (
    # https://huggingface.co/datasets/openai/gsm8k; the rows' columns and counts were checked on the published files.
    Benchmark("gsm8k", "gsm8k", "openai/gsm8k", "test", "question", "answer", 1319, config="main"),
    # https://huggingface.co/datasets/HuggingFaceH4/MATH-500/blob/main/eval.yaml (config default, split test, input
    # problem, target answer); columns problem, solution, answer, subject, level, unique_id.
    Benchmark("math500", "math", "HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    # https://huggingface.co/datasets/HuggingFaceH4/aime_2024: id, problem, solution, answer, url, year. Also common is
    # math-ai/aime24 (test; its gold answer is a box in `solution`), which math.load_rows reads as well.
    Benchmark("aime24", "math", "HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    # https://huggingface.co/datasets/math-ai/amc23: id, question, answer, url.
    Benchmark("amc23", "math", "math-ai/amc23", "test", "question", "answer", 40),
    # https://huggingface.co/datasets/math-ai/minervamath: question, answer (LaTeX without dollars).
    Benchmark("minerva", "math", "math-ai/minervamath", "test", "question", "answer", 272),
    # https://huggingface.co/datasets/Hothan/OlympiadBench/viewer: 18 configurations, each with the split train only.
    # OE_TO_maths_en_COMP is open-ended, text-only mathematics in English; `final_answer` is a list of texts.
    Benchmark(
        "olympiadbench",
        "math",
        "Hothan/OlympiadBench",
        "train",
        "question",
        "final_answer",
        674,
        config="OE_TO_maths_en_COMP",
    ),
    # https://huggingface.co/datasets/hkust-nlp/SimpleRL-Zoo-Data/tree/main: folders, no configurations. MATH of levels
    # 3 to 5, which the paper trains on (8,523 problems, section 5); two rows are said to have no gold answer.
    Benchmark(
        "math-level3to5",
        "math",
        "hkust-nlp/SimpleRL-Zoo-Data",
        "train",
        "question",
        "gt_answer",
        8523,
        config="simplelr_qwen_level3to5",
        has_folders=True,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of this name in [`BENCHMARKS`].

    Raises:
        ValueError: If there is none.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}: take one of {', '.join(BENCHMARKS)}, or name a dataset")
    return BENCHMARKS[name]


def published_as(dataset_name: str) -> Benchmark | None:
    """The benchmark whose data set has this name on the Hub (as in "openai/gsm8k"), or `None`."""
    return next((benchmark for benchmark in _TABLE if benchmark.dataset_name == dataset_name), None)
