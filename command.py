"""The command line: flags, processes, devices, signals, errors. Nothing of the method.

A flag that a program has not looked at before its work begins would change nothing, and is an error
(Flags.check_used): so each is looked at only where it has an effect. `run` turns bad input, a full
disk, a lack of memory and signals into one line and an exit code. Programs import this file first:
from then on a signal is answered, while torch takes its seconds.
"""
import argparse
import contextlib
import difflib
import importlib.util
import io
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path


# ---------------------------------------------------------------- flags

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = not any(action.default is z for z in (None, False, argparse.SUPPRESS))
        shown = shown and action.default != []
        return super()._get_help_string(action) if shown else action.help


class Flags(argparse.Namespace):
    """The parsed flags; notes which were given and which the program has looked at."""

    def __init__(self, values, given, helps):
        super().__init__(**values)
        self._given, self._helps, self._read = given, helps, set()

    def __getattribute__(self, name):
        if not name.startswith("_"):
            vars(self).get("_read", set()).add(name)
        return super().__getattribute__(name)

    def check_used(self, *later):
        """ValueError for a flag that was given and that this run has not looked at, nor will
        (later: names): it would do nothing. To be called once all is read, before any work."""
        for name in sorted(self._given - self._read - set(later)):
            raise ValueError(f"--{name} would change nothing in this run; leave it out, or see "
                             f"what it is for: {self._helps[name]}")


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, the closest match for a mistyped flag."""

    def __init__(self, **kw):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kw)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else [str(a) for a in args]
        known, unknown = super().parse_known_args(args, namespace)
        typed = {a.split("=")[0] for a in args}
        given = {a.dest for a in self._actions if typed & set(a.option_strings)}
        return Flags(vars(known), given, {a.dest: a.help for a in self._actions}), unknown

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = closest(unknown[0].split("=")[0], self._option_string_actions, "see --help")
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return known

    def error(self, message):
        raise ValueError(message)


def closest(word, known, otherwise=None):
    """What to tell of a mistyped word: the known one that it may stand for, or all."""
    close = difflib.get_close_matches(word, known, 1)
    all_of_them = otherwise or f"choose one of {', '.join(known)}"
    return f"did you mean {close[0]}?" if close else all_of_them


def number(kind, low, high=None):
    """An argparse type: a finite number between low and high, both allowed (high: that of 32 bits
    for whole numbers)."""
    most = high or (2 ** 31 - 1 if kind is int else sys.float_info.max)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number")
        if not low <= value <= most:
            wanted = (f"{low} to {high}" if high else
                      f"at least {low}" if value < low else f"at most {most}")
            raise argparse.ArgumentTypeError(f"{text} is out of range: {wanted}")
        return value
    return parse


def parse_settings(pairs, kinds, limits):
    """{name: value} of the NAME=VALUE pairs of --set. kinds: {name: type}; limits: {name: (low,
    high), or the words to choose from}. ValueError for another name, type or value."""
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {pair}: no such setting; {closest(name, kinds)}")
        kind, limit = kinds[name], limits.get(name)
        try:
            value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            what = "0 or 1" if kind is bool else f"<{kind.__name__}>"
            raise ValueError(f"--set {pair}: expected {name}={what}") from None
        if limit and kind is str and value not in limit:
            raise ValueError(f"--set {pair}: choose {' or '.join(limit)}")
        if limit and kind is not str and not limit[0] <= value <= limit[1]:          # nor NaN
            raise ValueError(f"--set {name}={value} is out of range: {limit[0]} to {limit[1]}")
        values[name] = value
    return values


# ---------------------------------------------------------------- signals

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 10           # seconds


@contextlib.contextmanager
def on_signal(act):
    """Signals that ask a program to end call act(name); those that it was told to ignore (nohup)
    stay ignored."""
    asked = [s for s in ENDING if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number, frame: act(signal.Signals(number).name))
              for s in asked}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def interrupt(name):
    """End by KeyboardInterrupt; where a library swallows it, PATIENCE seconds later without."""
    late = threading.Timer(PATIENCE, leave, [signal.Signals[name], None])
    late.daemon = True
    late.start()
    raise KeyboardInterrupt(name)


def leave(number, frame):
    """End at once, with one line: nothing has begun that could be saved."""
    if int(os.environ.get("RANK", 0)) == 0:
        name = signal.Signals(number).name
        os.write(2, f"{Path(sys.argv[0]).name}: stopped by {name}\n".encode())
    os._exit(128 + number)


# ---------------------------------------------------------------- processes, devices

class World:
    """Rank and size under torchrun, or 0 of 1 alone; the device of this process."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.size > 1:
            join("nccl" if self.device.type == "cuda" else "gloo", timedelta(minutes=10))

    def mean(self, *values):
        """The mean of each value over the ranks, as floats."""
        import torch
        total = torch.tensor([float(v) for v in values], device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(total)
        return [v / self.size for v in total.tolist()]


def join(backend, wait):
    """Meet the other processes that torchrun started: within two minutes, since who has not come by
    then is dead, or in another run. Later they wait for each other for the timedelta `wait`."""
    import torch.distributed as dist
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    store.set_timeout(wait)                  # NCCL meets there again at its first sum


def gather(images, shares, rank):
    """Rank 0 receives into its array images (n, ...) what the others made: rank r the rows
    shares[r], a tensor of indices. The last that the processes have to do with each other."""
    import torch
    dist = torch.distributed
    for r, index in enumerate(shares):
        if r > 0 and rank in (0, r) and len(index):
            part = torch.from_numpy(images[index.numpy()])
            dist.send(part, 0) if rank == r else dist.recv(part, r)
            images[index.numpy()] = part
    dist.barrier()
    dist.destroy_process_group()


def pick_device(name):
    """The torch.device of 'auto', 'cpu', 'cuda', 'cuda:1' ..., which becomes the current one;
    ValueError if it cannot be used. Under torchrun 'auto' and 'cuda' are the process's own GPU."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("this torch sees no CUDA GPU")
            index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            if index >= torch.cuda.device_count():
                raise RuntimeError(f"no GPU {index}, there are {torch.cuda.device_count()}: start "
                                   "as many processes, or use --device cpu")
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(0, device=device).cpu()              # "meta" holds no numbers
    except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
        why = str(error).splitlines()[0][:150]
        raise ValueError(f"--device {name} cannot be used: {why}") from None
    return device


def check_memory(need):
    """MemoryError if so many bytes are more than this machine has: where a kernel promises any
    amount, it would kill the process in the middle of taking it."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > has:
        raise MemoryError(f"{need / 1e9:.3g} GB are needed, this machine has {has / 1e9:.3g} GB")


def set_threads(model, device, threads=0):
    """On a CPU: `threads`, or if 0 one for small models; the fastest exact products for large ones.

    A second thread gives gpt-tiny 1.5x on an idle machine of 2 cores, and costs it 30x when another
    program uses the other core.
    """
    import torch
    if torch.device(device).type == "cpu":
        if threads or model.num_params < 5e6:
            torch.set_num_threads(threads or 1)
        if model.num_params > 5e6 and importlib.util.find_spec("fast"):
            import fast
            fast.exact_products()


# ---------------------------------------------------------------- output, errors

class Stream(io.FileIO):
    """Standard output whose reader may go away (`| head`, a closed terminal): the work goes on."""

    def write(self, text):
        try:
            return super().write(text)
        except OSError:
            return len(text)


def lasting(stream):
    """A standard stream that no reader and no character can break."""
    stream.flush()
    raw = io.BufferedWriter(Stream(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)


LESS = ("train.py: raise --accumulate, add --checkpoint_blocks, or lower --global_batch; "
        "sample.py, evaluate.py: lower --batch_size or --n, --m or --K with --refine")
# words in errors that have no class of their own
MEMORY = "allocate memory|(out of|not enough) memory|(size calculation|multiplication) overflow"
GONE = "gloo|nccl|store|socket|connect|timed out"


def meaning(error):
    """The line for an error that is not the program's own; None: it is a bug."""
    line, many = " ".join(str(error).split()), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return line
    if isinstance(error, ModuleNotFoundError):
        return f"{line}: a file of this project, or a package of requirements.txt, is missing"
    if isinstance(error, MemoryError) or re.search(MEMORY, line, re.I):
        return f"out of memory: {LESS} ({line[:200]})"
    if many and re.search(GONE, f"{type(error).__name__} {line}", re.I):
        return f"another process of this run ended, or did not answer in time ({line[:200]})"
    return None


def run(main):
    """Run a program: bad input (ValueError, OSError), too little memory, another process that is
    gone are one line on stderr and exit code 2, a signal one line and 128 + its number;
    TRACEBACK=1 shows where."""
    sys.stdout, sys.stderr = (lasting(s) if s and s is standard else s for s, standard in (
        (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)))
    # of many processes the first speaks at once; the others, who mostly met the same, wait for
    # torchrun to end them, and speak if nobody did
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    program = Path(sys.argv[0]).name
    try:
        with on_signal(interrupt):
            main()
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(f"{program}: stopped by {stop}", file=sys.stderr)
        sys.exit(128 + signal.Signals[str(stop)])
    except (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        message = meaning(error)
        if message is None or os.environ.get("TRACEBACK"):
            raise
        time.sleep(5 * (rank > 0) + 5 * (local > 0))
        print(f"{program}: error: {message}", file=sys.stderr)
        sys.exit(2)


program = getattr(sys.modules["__main__"], "__file__", None)
if program and Path(program).resolve().parent == Path(__file__).resolve().parent:
    # not in a program that imports ours
    for name in ("stdout", "stderr"):                    # closed, as a daemon's are
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for ending in ENDING:
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, leave)
