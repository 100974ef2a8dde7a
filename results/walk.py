"""Which functions a run enters, by room, and the way from main to the loss: for readers, and to count.

    python results/walk.py --method safedpo [FLAGS of train.py]      two steps on the toy world, its closing table
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

READ = ("losses", "batch", "data", "lora_moe", "methods", "train", "eval", "report")  # README's order, and the table


def main():
    entered, way = {}, []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        name = frame.f_code.co_qualname
        if event != "call" or path.parent != ROOT or "<" in name or "__" in name:
            return
        entered.setdefault(path.stem, {})[name] = None
        if path.stem == "losses" and not way:
            while frame:
                if Path(frame.f_code.co_filename).parent == ROOT:
                    way.insert(0, frame.f_code.co_qualname)
                frame = frame.f_back

    with tempfile.TemporaryDirectory() as out:
        sys.setprofile(note)
        train.main([*sys.argv[1:], "--max_steps", "2", "--out", f"{out}/run", "--device", "cpu"])
        sys.setprofile(None)
    for room in sorted(entered, key=lambda room: (room not in READ, READ.index(room) if room in READ else 0, room)):
        print(f"{room} {len(entered[room])}: {', '.join(entered[room])}")
    print(f"functions in {', '.join(READ)}: {sum(len(entered.get(room, ())) for room in READ)}")
    print(" → ".join(name for name in way if not name.startswith("<")))


if __name__ == "__main__":
    main()
