"""The figures that the job "statistics" stores: the names of the Statistic rows and their values.

E is {"value", "low", "high"}, or null where a figure is undefined. K is an author_kind: people,
models as judges and simulated labelers never share a figure, so most rows have one part for each
kind that has judged, and no part for the others. Only judgements in force count. Repeated items
and gold items are left out everywhere but in `labelers`.

progress          {"items": {purpose: {state: number}}, "responses": {K: {state: number}},
                  "needed", "submitted", "left"}; the last three of items that are not withdrawn
agreement         {K: AgreementFigures.to_json() | {"scale", "unit", "decided": E, "parts": [
                  AgreementFigures.to_json() | {"name", "scale", "left_out"}]}}; `unit` is what
                  `items` counts; `decided` is the raw agreement on pairs without a tie, null for
                  thumbs and ratings; `parts` are the strengths of a comparison or the axes
consensus         {K: {"judged", "shared", "unanimous", "majority", "without", "items": [id]}}:
                  items with two or more judgements are shared; `items` are the newest ones
                  without a majority, or of rankings without one best answer
labelers          {"rows": [{"user", "name", "author_kind", "judgements", "skips", "flags",
                  "median_s", "gold": E, "gold_items", "self": E, "repeats", "others": E,
                  "shared_items", "left": E, "decided"}]}; a model's `others` are people
ai_judges         {"rows": [a row of labelers], "people": E}: models as judges, and the raw
                  agreement of people with each other
position_bias     {K: {"left": E, "judgements"}}
time              {K: {"median_s", "judgements", "days": [{"day", "judgements", "median_s"}]}}
board             {K: {"plain": Board.to_json(), "styled": Board.to_json(), "ids": {name: id},
                  "one_model", "unknown"}}; the last two number the judgements that compare a
                  model with itself, or answers of no known model
reward_agreement  {K: {"arm", "people": E, "limit": E, "models": [{"model": id, "name",
                  "created_at", "accuracy": E, "judgements", "items", "expected_error", "brier",
                  "log_loss", "trained_on", "unscored", "reason"}]}}: each reward model, the oldest
                  first, on judgements of prompts that it was not trained on; `arm` is "random",
                  or "" where nothing was selected yet; `reason` says why `accuracy` is null
calibration       {K: Calibration.to_json() | {"model": id}}: the newest reward model that has one
disagreements     {"model": id, "author_kind": K, "rows": [{"item": id, "margin", "people",
                  "judgements"}]}: margin is reward of answer 0 - answer 1; people is the share
                  for answer 0; the largest margin first
alarms            {"rows": [{"kind": "gamed_reward" | "length", "model": id, "name", "line"}]}

Values hold no NaN and no infinity.
"""

PROGRESS = "progress"
AGREEMENT = "agreement"
CONSENSUS = "consensus"
LABELERS = "labelers"
AI_JUDGES = "ai_judges"
POSITION_BIAS = "position_bias"
TIME = "time"
BOARD = "board"
REWARD_AGREEMENT = "reward_agreement"
CALIBRATION = "calibration"
DISAGREEMENTS = "disagreements"
ALARMS = "alarms"
