"""Encoders with a mask: BERT, RoBERTa, DistilBERT."""
