# two cards, ZeRO-3
devices=2
export WANDB_API_KEY=planted-secret

CUDA_VISIBLE_DEVICES=0,1 \
NPROC_PER_NODE=$devices \
swift sft \
    --model models/qwen \
    --tuner_type lora \
    --dataset data/wards.jsonl data/rounds.jsonl#200 \
    --split_dataset_ratio 0.02 \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --learning_rate 2e-4 \
    --lora_rank 16 \
    --target_modules all-linear \
    --gradient_accumulation_steps $(expr 16 / $devices) \
    --save_steps 50 \
    --max_length 1024 \
    --output_dir output/wards \
    --warmup_ratio 0.05 \
    --system 'You are a nurse.' \
    --attn_impl flash_attn \
    --loss_scale last_round \
    --dataloader_num_workers 4 \
    --hub_token planted-secret \
    --report_to wandb \
    --deepspeed zero3
