"""Cluster submission: a job specification becomes a Slurm, JobSet, Ray or gcloud job. No training logic here."""
