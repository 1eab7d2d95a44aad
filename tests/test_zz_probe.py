import threading, time
def test_x(s3_server, s3_bucket):
    import boto3
    c = s3_server.client(); b = s3_bucket[5:]
    wins=[]
    for size in (100, 100_000, 2_000_000):
      for r in range(30):
        res=[]
        bar=threading.Barrier(2)
        def w(i):
            cl=s3_server.client()
            bar.wait()
            try:
                cl.put_object(Bucket=b,Key=f"k{size}-{r}",Body=bytes([i])*size,IfNoneMatch="*"); res.append(i)
            except Exception as e: res.append(str(e)[:90])
        ts=[threading.Thread(target=w,args=(i,)) for i in (1,2)]
        [t.start() for t in ts]; [t.join() for t in ts]
        wins.append((size, sum(isinstance(x,int) for x in res)))
        if r<1: print(res)
    from collections import Counter
    print(Counter(wins))
