"""The ``llave`` command: train, evaluate, convert, embed, compress, index, search."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llave.printable import escaped, shown
from llave.stopping import Stopped, stoppable

Arguments = argparse.Namespace
GOES_ON = ("train", "evaluate", "embed", "compress", "index")  # they continue a stopped run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    A user's mistake gives one line on stderr and status 2. SIGINT and SIGTERM give one line and
    status 128 plus the signal's number. A closed stdout gives no line and status 141.
    """
    parser = _parser()
    command = "llave"
    try:
        with stoppable():
            arguments, rest = parser.parse_known_args(argv)
            command = f"llave {arguments.command}"
            asks = arguments.command == "search" and arguments.query is None
            if asks and len(rest) == 1 and not rest[0].startswith("-"):
                arguments.query = rest.pop()  # argparse leaves a query behind an option
            if rest and arguments.command != "train":
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            arguments.run(arguments, rest)
            sys.stdout.flush()
    except Stopped as stopped:
        again = "; the same command goes on" if command.split()[-1] in GOES_ON else ""
        if os.environ.get("RANK", "0") == "0":  # torchrun signals every process
            _say(f"{command}: stopped{again}")
        return 128 + stopped.number
    except BrokenPipeError:
        _let_go()
        return 141  # 128 + SIGPIPE; Windows has no SIGPIPE
    except Exception as error:
        _let_go()
        if not isinstance(error, _mistakes()):
            raise
        _say(f"{command}: error: {escaped(' '.join(str(error).split()))}")
        return 2
    return 0


def _mistakes() -> tuple[type[Exception], ...]:
    """Return the types of errors that a user's input or a disk causes."""
    from jinja2 import TemplateError  # raised by a chat template

    return ValueError, TypeError, OSError, ImportError, MemoryError, TemplateError


def _say(line: str) -> None:
    with suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr)


def _let_go() -> None:
    """Drop unwritten output where stdout is closed. Python would report it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llave", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, *examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + "\n".join(f"  {e}" for e in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    def workers(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--workers",
            type=int,
            help="processes that read and preprocess ahead of the model (a process's share of the "
            "cores less one, 1 to 4); 0: none",
        )

    def smaller(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--truncate-dim", type=int, help="keep so many values, for a Matryoshka model"
        )
        made.add_argument(
            "--dtype",
            choices=("float32", "float16", "int8", "binary"),
            default="float32",
            help="how values are stored (float32); binary: a bit each",
        )

    train = command(
        "train",
        _train,
        "Train an embedding model by a recipe; a run that was cut off goes on from its checkpoint.",
        "llave train tiny",
        "llave train my.yaml --loss.alpha 5 --trainer.learning_rate 2e-5",
        "llave train llave-0.5b --print > my.yaml",
        "torchrun --nproc_per_node 8 -m llave train llave-0.5b --data.images MMEB-train",
    )
    train.add_argument("recipe", help="a YAML file, or the name of one that comes with llave")
    train.add_argument(
        "--print",
        action="store_true",
        help="print the whole recipe, with the settings of its base and the defaults, and end",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole recipe, rows, steps, trained parameters and an estimate of memory; "
        "write nothing",
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "MMEB precision@1 and text-video recall per task, beside the paper's rows.",
        "llave evaluate llave-0.5b/model --tasks all --data TIGER-Lab/MMEB-eval --images MMEB-eval",
        "llave evaluate tiny/model --tasks text_to_image --data emoji/eval --images emoji/images",
        "torchrun --nproc_per_node 8 -m llave evaluate llave-7b/model --tasks vqa ood "
        "--data MMEB-eval --images MMEB-eval",
        "llave evaluate llave-7b/model --tasks MSR-VTT --data . --images videos "
        "--max-seq-length 8192",
    )
    evaluate.add_argument("model", help="a model folder or hub name")
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="names of tasks, or of groups of MMEB's tasks: all, ind, ood, classification, vqa, "
        "retrieval, grounding",
    )
    evaluate.add_argument("--data", required=True, help="folder of evaluation files, or hub name")
    evaluate.add_argument(
        "--images", required=True, help="folder the image and video paths are relative to"
    )
    evaluate.add_argument("--out", default="results", help="folder for the results (results)")
    evaluate.add_argument("--batch-size", type=int, default=16)
    workers(evaluate)
    evaluate.add_argument(
        "--max-seq-length", type=int, help="instead of the model's; 32 frames take 6,273 tokens"
    )

    evaluate.add_argument("--html", metavar="PAGE", help="write a page of the worst rows")
    evaluate.add_argument(
        "--plot", metavar="FILE", help="draw the similarities of positives and negatives"
    )
    evaluate.add_argument(
        "--before",
        metavar="FOLDER",
        help="another model's results, such as before training: drawn beside these",
    )

    convert = command(
        "convert",
        _convert,
        "Turn a released LLaVE checkpoint into a folder for SentenceTransformer.",
        "llave convert LLaVE-0.5B released-0.5b --check example.jpg",
    )
    convert.add_argument("source", help="folder of the checkpoint (config, tokenizer, weights)")
    convert.add_argument("destination", help="folder to make; must not exist")
    convert.add_argument("--check", metavar="IMAGE", help="print the model card's scores for it")
    convert.add_argument("--allow-pickle", action="store_true", help="read .bin weights too")

    embed = command(
        "embed",
        _embed,
        "Embed a corpus into parquet shards; may be killed and started again.",
        "llave embed released-0.5b photos/ --out photos.embeddings",
        "llave embed released-0.5b photos/ --out photos.int8 --dtype int8",
        "torchrun --nproc_per_node 8 -m llave embed released-0.5b corpus.jsonl --out embeddings",
    )
    embed.add_argument("model", help="a model folder or hub name")
    embed.add_argument(
        "input", help="JSONL or parquet of id, text, image; a .txt of texts; or images"
    )
    embed.add_argument("--out", required=True, help="folder of the shards")
    embed.add_argument("--batch-size", type=int, default=32)
    workers(embed)
    embed.add_argument("--shard-rows", type=int, default=4096)
    smaller(embed)
    embed.add_argument(
        "--image-root", help="folder that holds the images (the input's); / allows any"
    )
    embed.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="skip: leave out, count and name rows that cannot be used",
    )

    compress = command(
        "compress",
        _compress,
        "A smaller copy of an embedded corpus: fewer dimensions, int8, or a bit for each value.",
        "llave compress photos.embeddings --out photos.int8 --dtype int8",
        "llave compress photos.embeddings --out photos.256 --truncate-dim 256 --dtype binary",
    )
    compress.add_argument("folder", help="written by llave embed")
    compress.add_argument("--out", required=True, help="folder of the smaller shards")
    smaller(compress)

    index = command(
        "index",
        _index,
        "Build or extend the faiss index of an embedded corpus, and measure its recall.",
        "llave index photos.embeddings",
        "llave index photos.embeddings --factory IVF4096,PQ64",
    )
    index.add_argument("folder", help="written by llave embed or llave compress")
    index.add_argument(
        "--factory", help="faiss's description of the index; by default the corpus's size decides"
    )

    search = command(
        "search",
        _search,
        "The rows of an embedded corpus nearest to queries, one JSON line each.",
        "llave search photos.embeddings 'a dog on a beach' --model released-0.5b -k 5",
        "llave search photos.embeddings --image dog.jpg --model released-0.5b",
        "llave search photos.embeddings --model released-0.5b   # asks for queries",
        "llave search photos.embeddings --model released-0.5b --queries queries.txt "
        "--html page.html --corpus photos/",
    )
    search.add_argument("folder", help="written by llave embed")
    search.add_argument("query", nargs="?", help="a text")
    search.add_argument("--image", help="an image, alone or beside the text")
    search.add_argument(
        "--queries",
        metavar="FILE",
        help="JSONL or parquet of id, text, image; a .txt of texts; or a folder of images",
    )
    search.add_argument(
        "--html", metavar="PAGE", help="write a page of the queries and what was found"
    )
    search.add_argument("--corpus", help="what was embedded, for the pictures and texts of --html")
    search.add_argument("--model", required=True, help="what the corpus was embedded with")
    search.add_argument("-k", type=int, default=10)
    search.add_argument(
        "--backend", choices=("exact", "faiss"), default="exact", help="faiss: ask the index"
    )
    search.add_argument(
        "--truncate-dim", type=int, help="compare only so many values, for a Matryoshka model"
    )
    search.add_argument("--partial", action="store_true", help="search an unfinished corpus")
    return parser


def _train(arguments: Arguments, overrides: list[str]) -> None:
    from llave import yaml12
    from llave.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, overrides)
    said = []
    if arguments.dry_run:
        from llave.dry_run import describe

        said = [f"# {escaped(line)}" for line in describe(recipe)]
    if arguments.print or arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print("# The whole recipe. Settings of trainer that are not here have its defaults.")
            print(yaml12.dump(recipe).rstrip(), *said, sep="\n")
        return
    from llave.training import train  # the import takes seconds

    train(recipe)


def _evaluate(arguments: Arguments, _: list[str]) -> None:
    from llave.evaluation import evaluate, format_table, refuse_out
    from llave.files import refuse_existing_file
    from llave.misses import write_misses
    from llave.modeling import load, set_length
    from llave.plots import plot_results, refuse_plot, results_before

    # Loading the model takes minutes, so this comes first.
    others = {"model": arguments.model, "data": arguments.data, "images": arguments.images}
    refuse_out(arguments.out, arguments.tasks, **others)
    if arguments.html:
        refuse_existing_file("html", Path(arguments.html))
    if arguments.plot:
        refuse_plot(arguments.plot)
    if arguments.before and not (arguments.plot and refuse_out(arguments.before, arguments.tasks)):
        raise ValueError("--before needs --plot, and a folder with results of these tasks")
    model = load(arguments.model)
    if arguments.max_seq_length is not None:
        set_length(model, arguments.max_seq_length)
    results = evaluate(
        model,
        arguments.tasks,
        data=arguments.data,
        images=arguments.images,
        out=arguments.out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    if not results:  # rank 0 has them
        return
    print(format_table(results))
    if arguments.html:
        write_misses(arguments.html, results, data=arguments.data, images=arguments.images)
    if arguments.plot:
        before = arguments.before and results_before(arguments.before, arguments.out, results)
        plot_results(results, arguments.plot, before)


def _convert(arguments: Arguments, _: list[str]) -> None:
    from llave.convert import check, convert
    from llave.modeling import inputs

    # The conversion takes minutes, so the image is read first.
    picture = inputs(images=arguments.check)["image"] if arguments.check else None
    convert(arguments.source, arguments.destination, allow_pickle=arguments.allow_pickle)
    if picture is not None:
        check(arguments.destination, picture)


def _embed(arguments: Arguments, _: list[str]) -> None:
    from llave.embedding import embed, refuse_out
    from llave.modeling import load

    refuse_out(arguments.out, arguments.input, arguments.model)  # before the model is loaded
    embed(
        load(arguments.model),
        arguments.input,
        arguments.out,
        batch_size=arguments.batch_size,
        shard_rows=arguments.shard_rows,
        truncate_dim=arguments.truncate_dim,
        dtype=arguments.dtype,
        image_root=arguments.image_root,
        on_error=arguments.on_error,
        workers=arguments.workers,
    )


def _compress(arguments: Arguments, _: list[str]) -> None:
    from llave.compression import compress
    from llave.recall import recall

    compress(
        arguments.folder,
        arguments.out,
        truncate_dim=arguments.truncate_dim,
        dtype=arguments.dtype,
    )
    share = recall(arguments.folder, arguments.out, indexed=False)
    _print_recall(share, "the whole embeddings")


def _index(arguments: Arguments, _: list[str]) -> None:
    from llave.index import build_index
    from llave.recall import recall

    made = build_index(arguments.folder, factory=arguments.factory)
    print(f"{made.factory} of {made.rows:,} rows in {made.file}")
    share = recall(arguments.folder, arguments.folder, indexed=True)
    _print_recall(share, "exact search")


def _print_recall(share: float | None, against: str) -> None:
    if share is not None:
        print(f"recall@10 against {against}, for rows of the corpus: {share:.3f}")


def _search(arguments: Arguments, _: list[str]) -> None:
    from llave.answers import Answered, answer, prompted, read_queries, write_answers
    from llave.files import refuse_existing_file
    from llave.modeling import inputs, load

    one = arguments.query is not None or arguments.image is not None
    if one and arguments.queries is not None:
        raise ValueError("--queries and a query were given; give one of them")
    if (arguments.html is None) != (arguments.corpus is None):
        raise ValueError("--html and --corpus go together; give both or none")
    if arguments.html:
        refuse_existing_file("html", Path(arguments.html))
        if not Path(arguments.corpus).exists():
            raise FileNotFoundError(f"--corpus {shown(arguments.corpus)} does not exist")
    query = inputs(text=arguments.query, images=arguments.image) if one else None
    model = load(arguments.model)
    ask = partial(
        answer,
        arguments.folder,
        model=model,
        k=arguments.k,
        backend=arguments.backend,
        truncate_dim=arguments.truncate_dim,
        partial=arguments.partial,
    )
    if query is not None:
        rounds: Iterable[list[Answered]] = [ask([(arguments.image or "", query)])]
    elif arguments.queries is not None:
        rounds = [ask(read_queries(arguments.queries, model))]
    else:
        rounds = prompted(ask)
    answers = []
    for found in rounds:
        answers += found
        for item, hits in found:
            of = {} if one else {"query": item.name}
            for hit in hits:
                print(json.dumps(of | hit._asdict()), flush=True)
    if arguments.html:
        write_answers(arguments.html, arguments.folder, arguments.corpus, answers)
