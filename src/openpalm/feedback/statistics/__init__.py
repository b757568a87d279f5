"""Statistics of judgements, pure functions of numbers; numpy only, neither Django nor files."""
