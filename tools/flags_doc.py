"""The flags as a page, written from the tables that the server reads: python -m tools.flags_doc > docs/flags.md"""

from jaxserve.config import DEFAULT_MODEL
from jaxserve.flags import FLAGS, Flag, default_of
from jaxserve.foreign_flags import NO_EFFECT, NOT_YET, NOT_YET_SWITCHES

HEAD = f"""\
# Flags

Written by `make docs` from `jaxserve/flags.py`; do not edit.

`python -m jaxserve [flags]` and `jaxserve [flags]` are the same. No flag is needed: the default model is
{DEFAULT_MODEL}, and page size, batch, buckets and memory are chosen from the device and said in the log. Names are
SGLang's and vLLM's for the same thing; where there are several, any of them may be used, and `--a_b` is read as
`--a-b`. `--config FILE` reads the same names from a YAML file (`port: 8000`); the command line wins over it. An unknown
flag is an error that names the nearest known one. `--version` prints the version, `--help` this table in short.

| flag | what it is | values | default |
|---|---|---|---|
"""

ENVIRONMENT = """
## Environment

| variable | what it is |
|---|---|
| `JAXSERVE_CACHE_DIR` | used without `--cache-dir`; otherwise `jaxserve` in `$XDG_CACHE_HOME` or `~/.cache` |
| `JAXSERVE_API_KEY` | used when `--api-key` is not given, so that the key does not show in the process list |
| `JAXSERVE_ADMIN_API_KEY` | likewise for `--admin-api-key` |
| `JAXSERVE_STORE` | likewise for `--store`, whose address may hold a password (`PGPASSWORD` works too) |
| `JAXSERVE_DIST_SECRET` | the secret of several machines, without `--dist-secret-file` |
| `LWS_LEADER_ADDRESS`, `LWS_GROUP_SIZE`, `LWS_WORKER_INDEX` | of Kubernetes' LeaderWorkerSet, without `--nnodes` |
| `TPU_WORKER_HOSTNAMES`, `TPU_WORKER_ID` | of a TPU pod, whose metadata server is asked without them: likewise |
| `SLURM_STEP_NUM_NODES` and its kin | of `srun`: likewise ([scale.md](scale.md#several-machines-for-one-model)) |
| `XDG_DATA_HOME` | files and batches are in `jaxserve/files` there (or in `~/.local/share`) by default |
| `JAXSERVE_URL` | the server that `jaxserve chat` and `bench` use without `--url`; `JAXSERVE_API_KEY` is sent to it |
| `HF_TOKEN` | for hub models that ask for one |

The default model is fetched through the package index that pip is set up with (its configuration files and `PIP_*`).
"""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in flag.names)
    default = default_of(flag)
    if flag.parse is bool:
        values, shown = "switch", ""
    else:
        values = ", ".join(f"`{choice}`" for choice in flag.choices) if flag.choices else flag.parse.__name__
        values = {"str": "text", "int": "integer"}.get(values, values) + (" (several)" if flag.several else "")
        shown = "" if default in (None, ()) else f"`{default}`"
    return f"| {names} | {cell(flag.help)} | {values} | {shown} |\n"


def page() -> str:
    text = HEAD + "".join(map(row, FLAGS)) + ENVIRONMENT
    text += "\n## Accepted without effect\n\nOne warning each, so that command lines of other servers keep working.\n\n"
    text += "".join(f"* `{name}`: {why}\n" for name, (_, why) in NO_EFFECT.items() if why)
    text += "\n## Refused until they are served\n\nA value that asks for nothing, in brackets, is accepted.\n\n"
    for name, (allowed, why) in NOT_YET.items():
        neutral = f" ({', '.join(f'`{value}`' for value in allowed)})" if allowed else ""
        text += f"* `{name}`{neutral}: {why}\n"
    text += "".join(f"* `{name}`: {why}\n" for name, why in NOT_YET_SWITCHES.items())
    text += "* `--trust-remote-code`: code that comes with a checkpoint is never run\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
