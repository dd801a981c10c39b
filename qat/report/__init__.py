"""What a run leaves for people and scripts: report.json, the terminal table, report.html."""
