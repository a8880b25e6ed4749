"""Looking at what was trained: statistics over seeds, and reports made of MLflow's runs."""
