"""The command line: one table of flags, each naming the configuration field it fills. Imports nothing heavy.

Names are SGLang's and vLLM's for the same thing; --a_b is read as --a-b everywhere. A file given by --config holds the
same names as YAML keys; the command line wins over the file, the file over the defaults.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jaxserve import foreign_flags as foreign
from jaxserve.cluster_flags import CLUSTER_FLAGS, options_of
from jaxserve.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from jaxserve.flag_file import FlagError, Formatter, Parser, file_arguments
from jaxserve.flag_values import Flag, at_least, port, positive, seconds, share
from jaxserve.foreign_flags import NO_EFFECT, NOT_YET, NOT_YET_SWITCHES, REMOTE_CODE
from jaxserve.version import __version__

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line. engine holds the EngineConfig fields that were decided, but for the paths launch adds."""

    model: str
    revision: str | None
    cache_dir: str | None
    engine: Mapping[str, Any]
    server: ServerConfig
    warnings: tuple[str, ...]
    cluster: Mapping[str, Any] = field(default_factory=dict)  # what jaxserve.cluster.find_cluster is given


FLAGS: tuple[Flag, ...] = (
    Flag(
        ("--model", "--model-path"),
        "launch.model",
        "Hugging Face folder or hub name, .gguf file or converted checkpoint",
    ),
    Flag(("--revision",), "launch.revision", "branch, tag or commit of a hub model"),
    Flag(
        ("--cache-dir", "--download-dir"),
        "launch.cache_dir",
        "where models, checkpoints and compiled programs are kept",
    ),
    Flag(
        ("--load-format",),
        "engine.load_format",
        "what the weights are; dummy: random ones, a config.json is enough",
        choices=("auto", "safetensors", "gguf", "orbax", "dummy"),
    ),
    Flag(
        ("--tokenizer-path", "--tokenizer"),
        "server.tokenizer_path",
        "local folder with tokenizer.json, if not the model's",
    ),
    Flag(("--chat-template",), "server.chat_template", "Jinja file to use instead of the model's own template"),
    Flag(
        ("--tool-call-parser",),
        "server.tool_call_parser",
        "how the model writes tool calls; auto: as its chat template says; none: requests with tools are refused; "
        "other servers' names for these are taken too, as qwen25 or llama3_json",
        foreign.tool_call_parser,
        choices=("auto", "hermes", "llama3", "pythonic", "none"),
    ),
    Flag(
        ("--reasoning-parser",),
        "server.reasoning_parser",
        "thinking in <think> tags; auto: where the chat template knows them; deepseek-r1: also without the first tag",
        foreign.reasoning_parser,
        choices=("auto", "deepseek-r1", "qwen3", "none"),
    ),
    Flag(
        ("--served-model-name",),
        "server.served_model_names",
        "names that clients may use (default: the model's)",
        several=True,
    ),
    Flag(("--allow-any-model",), "server.allow_any_model", "answer requests for other model names too, not 404", bool),
    Flag(("--host",), "server.host", "address to listen on; 0.0.0.0 for every interface"),
    Flag(("--port",), "server.port", "port to listen on; 0 for any free one", port),
    Flag(("--api-key",), "server.api_key", "key that clients must send as bearer token"),
    Flag(
        ("--admin-api-key",),
        "server.admin_api_key",
        "key of the routes that change the server, as /flush_cache or /start_profile (default: --api-key)",
    ),
    Flag(("--disable-ui",), "server.disable_ui", "serve no page at /; the API alone", bool),
    Flag(
        ("--allowed-origins", "--cors-allow-origins"),
        "server.allowed_origins",
        "web pages that may call this server from a browser, as https://example.org, or *: every page "
        "(default: none, since any page could otherwise use a server on its reader's own machine)",
        several=True,
    ),
    Flag(("--ssl-certfile",), "server.ssl_certfile", "PEM file of the server's certificate: HTTPS instead of HTTP"),
    Flag(("--ssl-keyfile",), "server.ssl_keyfile", "PEM file of its key (default: in --ssl-certfile)"),
    Flag(("--ssl-keyfile-password",), "server.ssl_keyfile_password", "of --ssl-keyfile, if it is encrypted"),
    Flag(("--ssl-ca-certs",), "server.ssl_ca_certs", "PEM file of who signs the clients' certificates"),
    Flag(
        ("--ssl-cert-reqs",),
        "server.ssl_cert_reqs",
        "whether clients need a certificate: 0 no, 1 optional, 2 yes",
        int,
        choices=(0, 1, 2),
    ),
    Flag(
        ("--profile-dir",),
        "server.profile_dir",
        "folder that /start_profile writes into (default: profiles in --cache-dir)",
    ),
    Flag(
        ("--dtype",),
        "engine.dtype",
        "of weights and activations; auto: bfloat16, on CPUs without AMX float32",
        choices=("auto", "float32", "bfloat16"),
    ),
    Flag(
        ("--quantization",),
        "engine.quantization",
        "matrices of the layers in 8 bits, one scale per output channel; auto: as the checkpoint is; none: --dtype",
        foreign.quantization,
    ),
    Flag(
        ("--kv-cache-dtype",),
        "engine.kv_cache_dtype",
        "of the KV cache, in 8 bits with one scale per token and head; auto: that of the activations",
        foreign.kv_cache_dtype,
    ),
    Flag(("--device",), "engine.device", "where to run", choices=("auto", "cpu", "gpu", "tpu")),
    Flag(
        ("--tp-size", "--tensor-parallel-size", "--tp"),
        "engine.tp_size",
        "devices that share out the heads of every layer (default: on accelerators all that --dp-size leaves)",
        positive,
    ),
    Flag(
        ("--dp-size", "--data-parallel-size", "--dp"),
        "engine.dp_size",
        "ranks of --tp-size devices, each with all weights and with rows and KV cache of its own "
        "(default: 1, or what uses all devices without holding a KV head twice)",
        positive,
    ),
    *CLUSTER_FLAGS,
    Flag(
        ("--attention-backend",),
        "engine.attention_backend",
        "auto: pallas on TPU and Hopper, numba on CPU; else xla",
        foreign.attention_backend,
    ),
    Flag(
        ("--max-model-len", "--context-length"),
        "engine.max_model_len",
        "tokens of prompt and reply together (default: the model's, as far as memory allows)",
        positive,
    ),
    Flag(
        ("--max-running-requests", "--max-num-seqs"),
        "engine.max_running",
        "sequences that are decoded together (default: by device)",
        positive,
    ),
    Flag(
        ("--max-total-tokens",),
        "engine.max_total_tokens",
        "tokens that the KV cache holds (default: by memory)",
        positive,
    ),
    Flag(
        ("--mem-fraction-static", "--gpu-memory-utilization"),
        "engine.mem_fraction",
        "share of device memory for weights, temporaries and KV cache; not used on CPU",
        share,
    ),
    Flag(
        ("--page-size", "--block-size"),
        "engine.page_size",
        "tokens in a page of the KV cache (default: by device)",
        positive,
    ),
    Flag(
        ("--chunked-prefill-size", "--max-num-batched-tokens"),
        "engine.chunked_prefill_size",
        "prompt tokens computed in one step; rounded up to a page (default: by device)",
        positive,
    ),
    Flag(
        ("--schedule-policy",),
        "engine.schedule_policy",
        "order of the queue: longest cached prefix first, or first come first served",
        choices=("lpm", "fcfs"),
    ),
    Flag(("--disable-radix-cache",), "engine.disable_radix_cache", "keep no prefixes for later requests", bool),
    Flag(
        ("--enable-prefix-caching",),
        "engine.disable_radix_cache",
        "keep prefixes for later requests (the default)",
        bool,
        inverted=True,
    ),
    Flag(
        ("--disable-overlap-schedule",), "engine.disable_overlap", "plan a step only after the last one was read", bool
    ),
    Flag(
        ("--async-scheduling",),
        "engine.disable_overlap",
        "plan a step while the last one runs (the default)",
        bool,
        inverted=True,
    ),
    Flag(
        ("--enable-mixed-chunk",), "engine.mixed_chunk", "prefill and decode in one step (default: where it pays)", bool
    ),
    Flag(
        ("--compilation-cache-dir",), "engine.compilation_cache_dir", "of compiled programs (default: in --cache-dir)"
    ),
    Flag(
        ("--watchdog-timeout",),
        "engine.watchdog_timeout",
        "seconds a step may take before the server ends; 0: any",
        seconds,
    ),
    Flag(("--decode-log-interval",), "engine.decode_log_interval", "decode steps between two log lines", positive),
    Flag(
        ("--random-seed", "--seed"),
        "engine.random_seed",
        "of requests that bring no seed (default: another at every start), and of dummy weights",
        int,
    ),
    Flag(
        ("--record-plans",),
        "engine.record_plans",
        "file that gets the plan of every step when the server ends: a debugging aid, kept in memory until then",
    ),
    Flag(
        ("--sampling-defaults",),
        "server.sampling_defaults",
        "for parameters a request leaves out: generation_config.json, or OpenAI's",
        choices=("model", "openai"),
    ),
    Flag(("--stream-interval",), "server.stream_interval", "tokens per streamed chunk, at least", positive),
    Flag(
        ("--enable-cache-report", "--enable-prompt-tokens-details"),
        "server.enable_cache_report",
        "cached_tokens in usage (on by default)",
        bool,
    ),
    Flag(
        ("--max-queued-requests",),
        "server.max_queued_requests",
        "requests that may wait before others get 503 (default: no limit)",
        at_least(0),
    ),
    Flag(
        ("--file-storage-path", "--file-storage-pth", "--batch-storage-dir"),
        "server.file_storage_path",
        "folder of files and batches (default: in the user's data, see Environment)",
    ),
    Flag(
        ("--store",),
        "server.store",
        "one place of files and batches for a fleet: a postgresql:// address (default: SQLite in --file-storage-path)",
    ),
    Flag(
        ("--batch-concurrency",),
        "server.batch_concurrency",
        "requests of batches at work at once (default: twice --max-running-requests)",
        positive,
    ),
    Flag(
        ("--batch-max-running",),
        "engine.max_batch_running",
        "sequences of batches that are decoded together while interactive requests are there (default: a quarter of "
        "--max-running-requests, less one)",
        positive,
    ),
    Flag(
        ("--batch-max-prefill-tokens",),
        "engine.max_batch_prefill_tokens",
        "prompt tokens of batches in one step at such times; rounded up to a page (default: a quarter of "
        "--chunked-prefill-size)",
        positive,
    ),
    Flag(
        ("--batch-linger",),
        "engine.batch_linger",
        "seconds after the last interactive request in which batches still keep to these two limits",
        seconds,
    ),
    Flag(("--is-embedding",), "server.embedding_only", "serve embeddings only: chat and completions are a 400", bool),
    Flag(("--max-body-size",), "server.max_body_size", "MiB of one request body", positive),
    Flag(("--shutdown-timeout",), "server.shutdown_timeout", "seconds open requests get to finish at the end", seconds),
    Flag(("--log-level",), "server.log_level", "of the server and the engine", choices=LOG_LEVELS),
    Flag(
        ("--log-level-http", "--uvicorn-log-level"),
        "server.log_level_http",
        "of the access log (default: --log-level)",
        choices=LOG_LEVELS,
    ),
    Flag(
        ("--log-requests", "--enable-log-requests"),
        "server.log_requests",
        "one line per request, without its text",
        bool,
    ),
)


def _dashed(argument: str) -> str:
    """--a_b=c_d -> --a-b=c_d."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def default_of(flag: Flag) -> Any:
    """What the configuration holds when the flag is not given; None: chosen from model and device."""
    holder, name = flag.target.split(".")
    if holder == "launch":
        return {"model": DEFAULT_MODEL}.get(name)
    return next(
        item.default for item in fields(ServerConfig if holder == "server" else EngineConfig) if item.name == name
    )


def _help(flag: Flag) -> str:
    default = default_of(flag)
    shown = "" if flag.parse is bool or default in (None, ()) else f" (default: {default})"
    return (flag.help + shown).replace("%", "%%")


def build_parser(epilog: str = "") -> argparse.ArgumentParser:
    """The parser of `jaxserve`. Every value it holds was asked for: nothing has a default here."""
    parser = Parser(
        prog="jaxserve",
        usage="jaxserve [COMMAND] [flags]",
        formatter_class=Formatter,
        description="Serves a model to OpenAI clients. No flag is needed; --a_b is read as --a-b.",
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys; the command line wins over it")
    for flag in FLAGS:
        if flag.parse is bool:
            name = flag.names[0]
            opposite = () if name.startswith("--disable") else ("--no" + name[1:],)
            parser.add_argument(*flag.names, dest=name, action="store_true", help=_help(flag))
            if opposite:
                parser.add_argument(*opposite, dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            kind: Any = flag.parse
            parser.add_argument(
                *flag.names,
                dest=flag.names[0],
                type=kind,
                choices=flag.choices,
                nargs="+" if flag.several else None,
                metavar=None if flag.choices else flag.target.split(".")[1].upper(),
                help=_help(flag),
            )
    for name, (takes_value, _) in NO_EFFECT.items():
        _add_hidden(parser, name, takes_value)
    for name in NOT_YET:
        _add_hidden(parser, name, True)
    for name in NOT_YET_SWITCHES:
        _add_hidden(parser, name, False)
    return parser


def _add_hidden(parser: argparse.ArgumentParser, name: str, takes_value: bool) -> None:
    if takes_value:
        parser.add_argument(name, dest=name, nargs="+", help=argparse.SUPPRESS)
    else:
        parser.add_argument(name, dest=name, action="store_true", help=argparse.SUPPRESS)


def parse(argv: Sequence[str], epilog: str = "") -> Options:
    """argv (without the program's name) -> Options. Raises FlagError; --help (epilog: what it ends with) and --version
    print and exit."""
    parser = build_parser(epilog)
    given = _parse_known(parser, [_dashed(argument) for argument in argv])
    path = given.pop("config", None)
    targets = _targets(given)
    if path is not None:
        names = {name for action in parser._actions for name in action.option_strings}
        from_file = _parse_known(parser, file_arguments(path, names, lambda name: _unknown(name, parser)))
        targets = _targets(from_file) | targets
        given = from_file | given
    warnings = _check_others(given)
    values: dict[str, dict[str, Any]] = {"launch": {}, "engine": {}, "server": {}}
    for target, value in targets.items():
        holder, name = target.split(".")
        values[holder][name] = value
    warnings += foreign.drop_foreign_backend(values["engine"])
    if "log_level" in values["server"]:
        values["engine"]["log_level"] = values["server"]["log_level"]
    if "random_seed" in values["engine"]:
        values["server"]["random_seed"] = values["engine"]["random_seed"]
    launch = values["launch"]
    return Options(
        model=launch.get("model", DEFAULT_MODEL),
        revision=launch.get("revision"),
        cache_dir=launch.get("cache_dir"),
        engine=values["engine"],
        server=ServerConfig(**values["server"]),
        warnings=warnings,
        cluster=options_of(launch),
    )


def _targets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration fields by target. Raises FlagError where two flags of one source contradict each other."""
    targets: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.names[0] not in given:
            continue
        value = given[flag.names[0]]
        value = not value if flag.inverted else _listed(value) if flag.several else value
        if targets.setdefault(flag.target, value) != value:
            names = " and ".join(other.names[0] for other in FLAGS if other.target == flag.target)
            raise FlagError(f"{names} contradict each other; give one of them")
    return targets


def _listed(given: Sequence[str]) -> tuple[str, ...]:
    """Words, or one JSON array of them, as vLLM has it."""
    if len(given) == 1 and given[0].startswith("["):
        try:
            words = json.loads(given[0])
        except ValueError:
            raise FlagError(f"{given[0]} is no JSON array") from None
        if all(isinstance(word, str) for word in words):
            return tuple(words)
        raise FlagError(f"{given[0]} must be a JSON array of strings")
    return tuple(given)


def _parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise FlagError(_unknown(unknown[0], parser))
    return vars(known)


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; the model is named by --model {argument}"
    name = argument.split("=")[0]
    close = difflib.get_close_matches(name, _shown_names(parser), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --help for the ones that exist"
    return f"unknown flag {name}; {hint}"


def _shown_names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions if action.help != argparse.SUPPRESS for name in action.option_strings]


def _check_others(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings for names without effect. Raises FlagError for those that would have one."""
    if "--trust-remote-code" in given:
        raise FlagError(REMOTE_CODE)
    for name, (allowed, why) in NOT_YET.items():
        if name in given and tuple(given[name]) not in [(value,) for value in allowed]:
            accepted = f"; only {', '.join(allowed)} is accepted" if allowed else ""
            raise FlagError(
                f"{name} {' '.join(given[name])} is not supported yet: {why}{accepted}. Leave the flag out."
            )
    for name, why in NOT_YET_SWITCHES.items():
        if name in given:
            raise FlagError(f"{name} is not supported yet: {why}. Leave the flag out.")
    return tuple(f"{name} has no effect: {why}" for name, (_, why) in NO_EFFECT.items() if name in given)


def parse_or_exit(argv: Sequence[str], epilog: str = "") -> Options:
    """parse() for a program: a FlagError is printed and the process exits with 2."""
    try:
        return parse(argv, epilog)
    except FlagError as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
