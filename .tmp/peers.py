import torch
def t(f,n=10):
    for _ in range(3): f()
    g=torch.cuda.CUDAGraph(); torch.cuda.synchronize()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    r=[]
    for _ in range(7):
        a,b=(torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record(); g.replay(); b.record(); b.synchronize(); r.append(a.elapsed_time(b)*1e3/n)
    return sorted(r)[3]
one=torch.ones((),device='cuda')
for n,k in ((8192,28672),(8192,8192)):
    w=torch.randn(n,k,device='cuda',dtype=torch.bfloat16); w8=w.to(torch.float8_e4m3fn)
    for m in (64,128,256,1024,4096):
        x=torch.randn(m,k,device='cuda',dtype=torch.bfloat16); x8=x.to(torch.float8_e4m3fn)
        print(n,k,m,'bf16 %.1f fp8 %.1f'%(t(lambda: x@w.t()), t(lambda: torch._scaled_mm(x8,w8.t(),scale_a=one,scale_b=one,out_dtype=torch.bfloat16))),flush=True)
