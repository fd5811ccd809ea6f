import subprocess
import sys
import textwrap

from orchestrator.worker.watchdog import grace


def run(body):
    script = "import time, sys\nfrom orchestrator.worker.watchdog import Watchdog\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


def test_it_ends_a_process_that_ignores_it_and_says_where_it_was():
    done = run("""
        dog = Watchdog(lambda stack: print(stack, flush=True))
        dog.arm(0.2)
        def stuck():
            time.sleep(60)
        stuck()
        print("never")
    """)
    assert done.returncode == 1
    assert "in stuck" in done.stdout
    assert "never" not in done.stdout


def test_a_disarmed_watchdog_leaves_the_process_alone():
    done = run("""
        dog = Watchdog(lambda stack: print("barked", flush=True))
        dog.arm(0.2)
        dog.disarm()
        time.sleep(0.6)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_arming_again_moves_the_limit():
    done = run("""
        dog = Watchdog(lambda stack: print("barked", flush=True))
        for _ in range(6):
            dog.arm(2)
            time.sleep(0.4)
        dog.disarm()
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_a_failing_handler_still_ends_the_process():
    done = run("""
        def handler(stack):
            raise OSError("disk full")
        Watchdog(handler).arm(0.2)
        time.sleep(60)
    """)
    assert done.returncode == 1


def test_native_code_that_holds_the_interpreter_lock_is_ended_too():
    done = run("""
        import re
        import orchestrator.watchdog as module
        module.SECONDS_FOR_THE_THREAD = 0.5
        Watchdog(lambda stack: print("barked", flush=True)).arm(0.2)
        re.match(r"(a|aa)+$", "a" * 60 + "b")  # backtracks for years without releasing the lock
    """)
    assert done.returncode != 0
    assert "barked" not in done.stdout


def test_the_grace_grows_with_the_limit():
    assert grace(1) == 5
    assert grace(1000) == 100
