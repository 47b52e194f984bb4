"""What is said of models and captions: metrics, drawings, pages, logs."""
