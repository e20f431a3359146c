"""`deepspeed`: from a ds_config.json to the program that needs no DeepSpeed, as far as it goes."""

import keyword
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardadam.cli.ds_config import AUTO, ConfigError, Settings, read
from shardadam.cli.ds_keys import AUTO_OF, IMPOSSIBLE, LOOP, NEEDLESS, UNLESS
from shardadam.cli.telling import DAMAGED, WHOLE, one_line

_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
_TAKES = {
    **{"lr": float, "betas": tuple, "eps": float, "weight_decay": float, "amsgrad": bool},
    **{"maximize": bool, "momentum_decay": float, "decoupled_weight_decay": bool},
}
"""Arguments that DeepSpeed hands on to torch.optim's class of the name, and ours takes too."""
_ELSEWHERE, _NEEDLESS, _IMPOSSIBLE, _AUTO = (
    "To write elsewhere in the program:",
    "Needless here:",
    "Can't be translated:",
    'Filled in by Hugging Face where it is "auto"; write the value:',
)


def print_translation(path: Path) -> int:
    """Print the program for the config in ``path`` and return the exit code.

    Raises:
        ConfigError: it can't be read, or a value is none.
        OSError: no file.
    """
    translation = Translation(Settings(read(path)))
    print(f"# From {one_line(path.name)}, for torchrun with as many ranks.")
    print(translation.program())
    return DAMAGED if translation.said[_IMPOSSIBLE] else WHOLE


class Translation:
    """What to write for ``settings``; something is said of each.

    Raises:
        ConfigError: a value is none of its kind, or the optimizer no Adam.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = "AdamW"
        self.imports = ["import torch", "", "import shardadam"]
        self.before: list[str] = []
        self.arguments: dict[str, tuple[str, str]] = {}
        self.after: list[str] = []
        # By title and text, the settings that it is said of.
        self.said: dict[str, dict[str, list[str]]] = {
            title: defaultdict(list) for title in (_ELSEWHERE, _NEEDLESS, _IMPOSSIBLE, _AUTO)
        }
        _switched_off(self)
        _optimizer(self)
        _bfloat16(self)
        _float16(self)
        _zero(self)
        _loop(self)
        for key, value in list(settings.unsaid.items()):
            _by_table(self, key, value)

    def program(self) -> str:
        """Python; what is not code is in comments."""
        lines = [*self.imports, "", *self.before]
        lines += [f"optimizer = shardadam.{self.name}(", "    model.named_parameters(),"]
        lines += [f"    {name}={code},  # {why}" for name, (code, why) in self.arguments.items()]
        lines += [")", *self.after]
        for title, texts in self.said.items():
            if texts:
                lines += ["", f"# {title}"]
                lines += [f"#   {', '.join(keys)}: {text}" for text, keys in texts.items()]
        return "\n".join(lines)

    def say(self, title: str, text: str, *keys: str) -> None:
        """Say ``text`` of the settings ``keys``."""
        for key in keys:
            self.said[title][text].append(self.settings.shown(key))
            self.settings.unsaid.pop(key, None)

    def argument(self, name: str, value: Any, key: str) -> None:
        """Write an argument for the setting ``key``."""
        code = AUTO_OF.get(name, "...") if value == AUTO else repr(value)
        self.arguments[name] = code, self.settings.shown(key)
        self.settings.unsaid.pop(key, None)

    def code(self, key: str) -> str:
        """A comment for a line that is written for the setting ``key``."""
        self.settings.unsaid.pop(key, None)
        return f"  # {self.settings.shown(key)}"


def _switched_off(to: Translation) -> None:
    """Sections that are there, and off."""
    for key, value in list(to.settings.unsaid.items()):
        section, _, switch = key.rpartition(".")
        if section and (switch, value) in (("enabled", False), ("device", "none")):
            to.say(_NEEDLESS, "switched off", *to.settings.below(section))


def _optimizer(to: Translation) -> None:
    settings, section = to.settings, "optimizer.params"
    kind = settings.take("optimizer.type", str)
    if kind is None:
        text = "the program makes it: give its arguments to this one"
        to.say(_ELSEWHERE, text, *(settings.below("optimizer") or ["optimizer"]))
        return
    # DeepSpeed's own names in any case, torch.optim's as they are.
    to.name = {"adam": "Adam", "adamw": "AdamW"}.get(kind.lower(), kind)
    if to.name not in ("Adam", "AdamW", "NAdam"):
        raise ConfigError(f"optimizer.type: expected Adam, AdamW or NAdam, found {kind!r}")
    key = f"{section}.adam_w_mode"
    if to.name == "Adam" and settings.take(key, bool, True):
        to.name = "AdamW"
        text = "DeepSpeed's Adam is AdamW unless adam_w_mode is false"
        to.say(_ELSEWHERE, text, "optimizer.type", *settings.below(key))
    to.say(_NEEDLESS, f"it is shardadam.{to.name}", *settings.below("optimizer.type"))
    to.say(_NEEDLESS, f"it is shardadam.{to.name}", *settings.below(key))
    of_torch = to.name == "NAdam" or settings.take(f"{section}.torch_adam", bool, False)
    for name, kind_of_value in _TAKES.items():
        key = f"{section}.{name}"
        value = settings.pair(key) if name == "betas" else settings.take(key, kind_of_value)
        if value is not None:
            to.argument(name, value, key)
        elif name == "weight_decay" and to.name == "AdamW" and not of_torch:
            to.arguments[name] = "0.0", "DeepSpeed's default; torch's and ours is 0.01"
    key = f"{section}.bias_correction"
    if settings.take(key, bool, True) is False:
        to.say(_IMPOSSIBLE, "bias is always corrected", key)
    key = f"{section}.fp32_optimizer_states"
    if settings.take(key, bool, True) is False:
        to.argument("state", "bf16", key)


def _bfloat16(to: Translation) -> None:
    settings = to.settings
    section = "bf16" if settings.has("bf16") else "bfloat16"
    if not _cast(to, section, "torch.bfloat16"):
        return
    key = f"{section}.bf16_master_weights_and_grads"
    if settings.take(key, bool, False) is True:
        to.argument("master", "none", key)
    key = f"{section}.bf16_optimizer_states"
    if settings.take(key, bool, False) is True:
        to.argument("state", "bf16", key)
    key = f"{section}.check_grad_overflow"
    if settings.take(key, bool, True) is not False:
        text = (
            "no step is skipped in bf16 by itself; optimizer.clip_grad_norm_(…, "
            "error_if_nonfinite=True) raises where gradients are not finite"
        )
        to.say(_IMPOSSIBLE, text, key)


def _float16(to: Translation) -> None:
    settings = to.settings
    if not _cast(to, "fp16", "torch.float16"):
        return
    if settings.take("fp16.enabled", bool) == AUTO:
        text = "fp16 wants a torch.amp.GradScaler, and no shard_grads=True"
        to.say(_AUTO, text, *settings.below("fp16"), "fp16.enabled")
        return
    if any("bfloat16" in line and not line.startswith("if ") for line in to.before):
        raise ConfigError("bf16.enabled and fp16.enabled: expected one of the two, found both")
    static = settings.take("fp16.loss_scale", float, 0.0)
    power = settings.take("fp16.initial_scale_power", int, 16)
    window = settings.take("fp16.loss_scale_window", int, 1000)
    start = f"2.0**{16 if power == AUTO else power}"
    if static not in (0.0, AUTO):
        start = repr(float(static))
        to.say(_IMPOSSIBLE, "GradScaler starts there, and changes it", "fp16.loss_scale")
    to.after += [
        f"scaler = torch.amp.GradScaler(  {to.code('fp16.enabled').strip()}",
        f"    init_scale={start},{to.code('fp16.initial_scale_power')}",
        f"    growth_interval={1000 if window == AUTO else window},"
        f"{to.code('fp16.loss_scale_window')}",
        ")",
    ]
    text = "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()"
    to.say(_ELSEWHERE, text, "fp16.enabled")


def _cast(to: Translation, section: str, dtype: str) -> bool:
    """Write the cast of the model, if ``section`` has one."""
    key = f"{section}.enabled"
    on = to.settings.take(key, bool, False)
    if on:
        test = f"if args.{section}: " if on == AUTO else ""
        to.before.append(f"{test}model = model.to({dtype}){to.code(key)}")
    else:
        to.say(_NEEDLESS, "switched off", *to.settings.below(section))
    return bool(on)


def _zero(to: Translation) -> None:
    settings, key = to.settings, "zero_optimization.stage"
    stage = settings.take(key, int, 0)
    if stage not in range(4):
        raise ConfigError(f"{key}: expected 0, 1, 2 or 3, found {stage!r}")
    if stage < 2:
        to.say(_NEEDLESS, "the state is always sharded, as in stage 1", *settings.below(key))
    elif to.after:
        text = "with fp16's GradScaler gradients are not sharded (shard_grads=True)"
        to.say(_IMPOSSIBLE, text, key)
    else:
        to.argument("shard_grads", True, key)
    if stage == 3:
        text = "params stay whole, this is ZeRO-2; FSDP2 shards them, and takes this optimizer"
        to.say(_IMPOSSIBLE, text, key)
    key = "zero_optimization.offload_optimizer.device"
    device = settings.take(key, str)
    if settings.take("zero_optimization.cpu_offload", bool, False) is True:
        device, key = "cpu", "zero_optimization.cpu_offload"
    if device == "cpu":
        to.argument("offload", "cpu", key)
    elif device is not None:
        text = "of params on a GPU, no state is kept in files; of those on the CPU it is: offload="
        to.say(_IMPOSSIBLE, text, key, *settings.below(f"{key.rpartition('.')[0]}.nvme_path"))


def _loop(to: Translation) -> None:
    settings, key = to.settings, "gradient_clipping"
    norm = settings.take(key, float, 0.0)
    if norm == AUTO or norm > 0:
        to.argument("max_grad_norm", norm, key)
    key = "gradient_accumulation_steps"
    steps = settings.take(key, int, 1)
    if steps != 1:
        count = f"args.{key}" if steps == AUTO else steps
        text = f"(loss / {count}).backward(), all but the last under optimizer.no_sync()"
        to.say(_ELSEWHERE, text, key)
    key = "data_types.grad_accum_dtype"
    sums = settings.take(key, str)
    if sums in ("fp32", "float32", "float"):
        text = "with shard_grads=True and without no_sync() gradients are added up in fp32"
        to.say(_ELSEWHERE, text, key)
    elif sums is not None:
        to.say(_IMPOSSIBLE, "gradients are added up in the params' dtype, or fp32", key)
    schedule = settings.take("scheduler.type", str)
    if schedule in _SCHEDULES:
        _scheduler(to, schedule)


def _scheduler(to: Translation, name: str) -> None:
    """DeepSpeed's own: it takes any optimizer, and needs no engine."""
    arguments = ""
    for key in to.settings.below("scheduler.params"):
        argument = key.removeprefix("scheduler.params.")
        if not argument.isidentifier() or keyword.iskeyword(argument):
            raise ConfigError(f"scheduler.params: expected arguments of {name}, found {argument!r}")
        value = to.settings.unsaid[key]
        arguments += f", {argument}={'...' if value == AUTO else repr(value)}"
        if value == AUTO:
            to.say(_AUTO, f"an argument of {name}", key)
        to.code(key)
    to.imports.insert(1, f"from deepspeed.runtime.lr_schedules import {name}")
    to.after.append(f"scheduler = {name}(optimizer{arguments}){to.code('scheduler.type')}")
    to.say(_ELSEWHERE, "scheduler.step(), after optimizer.step()", "scheduler.type")


def _by_table(to: Translation, key: str, value: Any) -> None:
    """Say what `ds_keys` does; of what it does not know, that it is not known."""
    if value == AUTO:
        return to.say(_AUTO, "what the TrainingArguments say", key)
    if value is None:
        return to.say(_NEEDLESS, "not set", key)
    for name in _around(key):
        if name in LOOP:
            return to.say(_ELSEWHERE, LOOP[name], key)
        if name in UNLESS:
            none, text = UNLESS[name]
            off = value == none and type(value) is type(none)
            return (
                to.say(_NEEDLESS, "so it is here", key) if off else to.say(_IMPOSSIBLE, text, key)
            )
        if name in NEEDLESS:
            return to.say(_NEEDLESS, NEEDLESS[name], key)
        if name in IMPOSSIBLE:
            return to.say(_IMPOSSIBLE, IMPOSSIBLE[name], key)
    if key.startswith("zero_optimization.stage3_"):
        return to.say(_NEEDLESS, "of ZeRO-3", key)
    to.say(_IMPOSSIBLE, "not known: misspelt, or of another version of DeepSpeed", key)


def _around(key: str) -> Iterator[str]:
    """The key, and the sections that it is in, the innermost first."""
    while key:
        yield key
        key = key.rpartition(".")[0]
