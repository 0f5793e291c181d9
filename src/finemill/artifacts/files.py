"""Names of the files in artifacts. Those of Hugging Face's folders are Hugging Face's."""

METRICS_FILE = "metrics.json"
SAMPLES_FILE = "samples.parquet"
REPORT_PAGE = "report.html"
REPORT_TEXT = "report.md"
TRAINING_FILE = "training.json"
