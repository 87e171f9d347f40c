"""FlowerTune's structure: a Flower app around TRL's SFTTrainer and PEFT."""
