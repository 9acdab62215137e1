"""The end of `make demo`: prints what RL made of the mid-trained toy and of the base, and fails unless RL
found far more to learn from in the one than in the other (the paper, section 10), the evaluation finds both
gains on problems of its own, and weights and representations moved as the paper says."""

import json
import sys
from pathlib import Path

runs = Path(sys.argv[1])
gained = {}
print("\nRL from                      held-out pass rate: before   after   unsolved before, solved after")
for name, start in (("rl", "the mid-trained toy"), ("rl-base", "the toy base")):
    curve = json.loads((runs / name / "rl.json").read_text())["curve"]
    before, after = curve[0][1], curve[-1][1]
    gained[name] = after["pass"] - before["pass"]
    steps = [line for line in map(json.loads, (runs / name / "metrics.jsonl").open()) if "lr" in line]
    seconds = sum(line[part] for line in steps for part in ("wait_s", "score_s", "train_s", "push_s"))
    print(f"{start:47s} {before['pass']:7.3f} {after['pass']:7.3f}   {after['frontier']['solved']} of "
          f"{after['frontier']['unsolved']}   ({curve[-1][0]} steps, {seconds:.0f} s)")
if gained["rl"] < 0.2 or gained["rl-base"] > gained["rl"] / 2:
    sys.exit(f"RL raised the mid-trained toy's pass rate by {gained['rl']:.3f}, the base's by "
             f"{gained['rl-base']:.3f}; at least 0.2, and at most half of that, were expected")
gains = json.loads((runs / "eval" / "compare.json").read_text())["gains"]
for pair in ("base to mt", "mt to rl"):
    if gains[pair]["toy-math"]["low"] <= 0:
        sys.exit(f"toy-math: {pair} gained {gains[pair]['toy-math']}; the interval should lie above 0")
pairs = {" ".join(pair["names"]): pair["rows"] for pair in json.loads(
    (runs / "analysis" / "weights.json").read_text())["pairs"]}
moved = {pair: next(row for row in rows if row["by"] == "total") for pair, rows in pairs.items()}
mid, rl = moved["base mt"], moved["mt rl"]
if mid["unchanged"]["0.01"] > 0.1 or rl["unchanged"]["0.01"] < 3 * mid["unchanged"]["0.01"] or (
        rl["relative_l2"] > mid["relative_l2"] / 20):
    sys.exit(f"weights: mid-training should move over 90 % by over 1 %, RL far less: {mid}, {rl}")
curves = json.loads((runs / "analysis" / "cka.json").read_text())["toy"]["pairs"]
for c, before in zip(curves["mt rl"], curves["base mt"], strict=True):
    if c["debiased"] < 0.98 or c["debiased"] < before["debiased"]:
        sys.exit(f"CKA of layer {c['layer']}: {c['debiased']} from mid-trained to RL, "
                 f"{before['debiased']} from base to mid-trained")
page = runs / "report" / "report.html"
text = page.read_text()
if len(text) > 5_000_000 or text.count("<section") < 11 or "<script" in text:
    sys.exit(f"{page}: {len(text):,} characters, {text.count('<section')} sections; at most 5 MB and at "
             f"least 11 sections were expected")
print(f"\nwhat it all came to: {page}")
