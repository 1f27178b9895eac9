"""Functions for workers to call, well-behaved and not. They take (prompt, response, row) like a user's reward, or a text."""

import os
import signal
import sys
import time


def length(prompt, response, row, scale=1.0):
    return scale * len(response)


def of_row(prompt, response, row):
    return row["difficulty"] * (response == row["answer"]) + (prompt[0]["content"] == "?")


def endless(prompt, response, row):
    while True:
        pass


def process_id(text):
    return os.getpid()


def echo(text):
    """Its length, after it has printed and read where a worker speaks with its parent."""
    print(text)
    sys.stdout.flush()
    os.write(1, b'{"value": 5.0}\n')
    assert sys.stdin.read() == ""
    return len(text)


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def allocate(size):
    return len(bytearray(size))


def misbehave(text):
    match text:
        case "loop":
            while True:
                pass
        case "hold the interpreter":  # no Python code runs meanwhile, of no thread: no alarm helps
            return float(int("9" * 4000) ** 10**7 > 0)
        case "ignore signals":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(3600)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "leave a child that holds the pipes":
            if os.fork() == 0:
                time.sleep(3600)
            os._exit(0)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "memory":
            return len(bytearray(1 << 40))
        case "raise":
            raise RuntimeError("no such problem")
        case "leave":
            sys.exit(1)
        case "nan":
            return float("nan")
        case "nothing":
            return None
        case "text":
            return "1.0"
    return 1.0
