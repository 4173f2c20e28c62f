"""Print the dashboard's queries as Prometheus recording rules, so that promtool can check them.

Grafana's variables are replaced by values that they may have.
"""

from __future__ import annotations

import json
from pathlib import Path

DASHBOARD = Path(__file__).parent / "dashboards" / "recur.json"
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def main() -> None:
    """Write the rules to standard output; JSON is YAML too."""
    rules = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            record = f"panel:{panel['id']}:{target['refId']}"
            rules.append({"record": record, "expr": expression})
    print(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}, indent=2))


if __name__ == "__main__":
    main()
